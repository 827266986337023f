"""vLLM's loader with a decoded stream of tensors, for checkpoints of the quantization method ``halfbyte``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as LOADERS
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from halfbyte.dialects import quantization_config_of
from halfbyte.engines.stream import decoded, is_input_scale
from halfbyte.engines.vllm_claims import METHOD, fp8_cache
from halfbyte.source.checkpoint import Checkpoint

logger = init_logger("vllm.halfbyte")


class HalfbyteModelLoader(DefaultModelLoader):
    """Checkpoints of the method ``halfbyte`` arrive as dense tensors, everything else as ever."""

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor as an unquantized checkpoint would have them, one at a time.

        Quantized weights are computed in FP32 and rounded to the type that the model computes in.
        """
        if model_config.quantization != METHOD:
            yield from super().get_all_weights(model_config, model)
            return
        # what vLLM logs as the time of loading begins here
        self.counter_before_loading_weights: float = time.perf_counter()
        checkpoint = Checkpoint.open(_folder(model_config.model, model_config.revision, self.load_config.download_dir))
        _say(checkpoint)
        unused = getattr(model, "is_unused_checkpoint_weight", lambda name: False)
        yield from decoded(checkpoint, model_config.dtype, unused)
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


def _folder(model: str, revision: str | None, cache: str | None) -> Path:
    """The checkpoint on this machine; vLLM has fetched its configuration already where it is a hub id."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json"]
    return Path(snapshot_download(model, revision=revision, cache_dir=cache, allow_patterns=wanted))


def _say(checkpoint: Checkpoint) -> None:
    """What is decoded, and what of the checkpoint's settings has no effect then."""
    counts = Counter(fmt.name for fmt in checkpoint.formats.values())
    what = ", ".join(f"{count} weights of {name}" for name, count in sorted(counts.items()))
    logger.info("halfbyte decodes %s while loading %s", what, checkpoint.inventory.source)
    if any(is_input_scale(checkpoint, weight) for weight in checkpoint.weights):
        logger.warning("Activations are not quantized under halfbyte; their calibrated scales are left out.")
    settings = quantization_config_of(checkpoint.inventory)
    if settings.get("kv_cache_scheme") and not fp8_cache(settings):
        logger.warning("The scales of the checkpoint's kv_cache_scheme are not used; see --kv-cache-dtype.")
