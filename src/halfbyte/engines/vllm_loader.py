"""vLLM's loader for checkpoints of the quantization method ``halfbyte``: what no layer reads itself comes decoded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as LOADERS
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from halfbyte.dialects import quantization_config_of
from halfbyte.engines.stream import decoded, is_input_scale
from halfbyte.engines.vllm_claims import METHOD, fp8_cache
from halfbyte.engines.vllm_experts import HalfbyteMoEMethod
from halfbyte.engines.vllm_linear import HalfbyteLinearMethod
from halfbyte.engines.vllm_names import open_checkpoint
from halfbyte.source.checkpoint import Checkpoint

logger = init_logger("vllm.halfbyte")


class HalfbyteModelLoader(DefaultModelLoader):
    """Checkpoints of the method ``halfbyte`` arrive as dense tensors, but for packed layers; others as ever."""

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor as an unquantized checkpoint would have them, one at a time.

        Quantized weights are computed in FP32 and rounded to the type that the model computes in. Those of packed
        layers are left out; the layers read them themselves when all others are there.
        """
        if model_config.quantization != METHOD:
            yield from super().get_all_weights(model_config, model)
            return
        # what vLLM logs as the time of loading begins here
        self.counter_before_loading_weights: float = time.perf_counter()
        where = (model_config.model, model_config.revision, self.load_config.download_dir)
        packed = packed_weights(model)
        checkpoint = _checkpoint_of(model) or open_checkpoint(*where)
        _say(checkpoint, packed)
        unused = getattr(model, "is_unused_checkpoint_weight", lambda name: False)
        yield from decoded(checkpoint, model_config.dtype, unused, packed)
        for source in getattr(model, "secondary_weights", ()):
            yield from self._get_weights_iterator(source)

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """As ever; with the method ``halfbyte`` a parameter that got no tensor is an error."""
        if model_config.quantization == METHOD and getattr(self, "enable_weights_track", None) is None:
            self.enable_weights_track = True
        super().load_weights(model, model_config)


def install() -> None:
    """Put the loader in the place of the default one, under whose names (auto, safetensors, ...) it goes."""
    if LOADERS.get(METHOD) is None:
        register_model_loader(METHOD)(HalfbyteModelLoader)
    for name, loader in LOADERS.items():
        if loader is DefaultModelLoader:
            # register_model_loader would warn users of every other checkpoint
            LOADERS[name] = HalfbyteModelLoader


def packed_weights(model: torch.nn.Module) -> frozenset[str]:
    """Names of the weights that the layers of a model read themselves."""
    return frozenset(weight.name for method in _methods(model) for weight in method.weights)


def _methods(model: torch.nn.Module) -> Iterator[HalfbyteLinearMethod | HalfbyteMoEMethod]:
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, HalfbyteLinearMethod | HalfbyteMoEMethod):
            yield method


def _checkpoint_of(model: torch.nn.Module) -> Checkpoint | None:
    """The checkpoint that a model's layers read."""
    return next((method.checkpoint for method in _methods(model)), None)


def _say(checkpoint: Checkpoint, packed: frozenset[str]) -> None:
    """Which weights stay packed, which are decoded, and what of the checkpoint's settings has no effect then."""
    source = checkpoint.inventory.source
    kept = Counter(fmt.name for name, fmt in checkpoint.formats.items() if name in packed)
    lost = Counter(fmt.name for name, fmt in checkpoint.formats.items() if name not in packed)
    if kept:
        logger.info("halfbyte keeps %s of %s as they are, and multiplies with them", _counted(kept), source)
    if lost:
        logger.info("halfbyte decodes %s while loading %s", _counted(lost), source)
    if any(is_input_scale(checkpoint, weight) for weight in checkpoint.weights):
        logger.warning("Activations are not quantized under halfbyte; their calibrated scales are left out.")
    settings = quantization_config_of(checkpoint.inventory)
    if settings.get("kv_cache_scheme") and not fp8_cache(settings):
        logger.warning("The scales of the checkpoint's kv_cache_scheme are not used; see --kv-cache-dtype.")


def _counted(formats: Counter[str]) -> str:
    return ", ".join(f"{count} weights of {name}" for name, count in sorted(formats.items()))
