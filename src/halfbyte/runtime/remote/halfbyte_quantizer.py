"""The dialect ``halfbyte`` in transformers.

This file and halfbyte_modules.py need torch, transformers and safetensors only, so that copies beside the weights
load them with ``trust_remote_code=True``; the halfbyte package imports the very same files.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .halfbyte_modules import (
    PARTS,
    QuantizedWeights,
    TiedWeight,
    dequantize_module,
    quantize_module,
    tie_module,
    untie_module,
)

METHOD = "halfbyte"
VERSION = 1
DTYPES = {"U8": torch.uint8, "U32": torch.uint32, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
logger = logging.getLogger("halfbyte")


class HalfbyteQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` of the dialect: formats in full, and which weights have which."""

    def __init__(
        self,
        version: int = VERSION,
        formats: dict[str, dict[str, Any]] | None = None,
        weights: dict[str, list[str]] | None = None,
        **others: Any,
    ) -> None:
        if version != VERSION:
            raise ValueError(f"this checkpoint has version {version} of the halfbyte dialect, not {VERSION}")
        self.quant_method = METHOD
        self.version, self.formats, self.weights = version, formats or {}, weights or {}

    def about(self, weight: str) -> dict[str, Any]:
        """The description of the format that a weight of the checkpoint has."""
        for name, patterns in self.weights.items():
            if any(re.match(pattern.removeprefix("re:"), weight) for pattern in patterns):
                return self.formats[name]
        raise ValueError(f"quantization_config does not say which format {weight} has; the checkpoint is damaged")


class HalfbyteQuantizer(HfQuantizer):
    """Makes room for codes and scales in the model before transformers loads them; missing tensors are errors."""

    requires_calibration = True

    def update_attn_implementation(self, config: Any) -> Any:
        """Take away what stops transformers where this quantizer is not there; the weights have their usual names."""
        if not str(getattr(config, "transformers_weights", None) or ".safetensors").endswith((".safetensors", ".json")):
            config.transformers_weights = None
        return super().update_attn_implementation(config)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        stored = self._stored(checkpoint_files)
        mapping = get_model_conversion_mapping(model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        expected = model.state_dict()
        tied = model.all_tied_weights_keys
        quantized = [name.removesuffix("_codes") for name in stored if name.endswith("_codes")]
        places = {
            weight: rename_source_key(weight, renamings, converters, model.base_model_prefix, expected)
            for weight in quantized
        }
        targets = {target for target, _ in places.values()}
        for weight, (target, pattern) in places.items():
            if target not in expected:
                continue  # reported below, unless the class says that it does without
            if pattern is not None:
                self._refuse_converted(weight, model)
                continue
            parts = {part: stored[f"{weight}_{part}"] for part in PARTS if f"{weight}_{part}" in stored}
            path, _, name = target.rpartition(".")
            self._install(model.get_submodule(path), name, weight, parts)
            # a checkpoint may hold either of two tied parameters, also the one that transformers ties to the other, or
            # both, of equal codes
            pairs = {t: t if source == target else source for t, source in tied.items() if target in (t, source)}
            for key, other in pairs.items():
                if other not in targets:
                    at, _, parameter = other.rpartition(".")
                    tie_module(model.get_submodule(at), parameter, model.get_submodule(path), name)
                del tied[key]
                model._tied_weights_keys = {k: v for k, v in model._tied_weights_keys.items() if k != key}
        _be_strict(model, self._elsewhere(places))
        if not hasattr(HfQuantizer, "get_new_dtype"):
            # transformers up to 5.20 leaves renamed tensors of a quantized checkpoint in the dtype of the file
            self.pre_quantized = False
        return model

    def _stored(self, checkpoint_files: list[str] | None) -> dict[str, torch.Tensor]:
        """Names and shapes of the checkpoint's tensors."""
        return _headers(checkpoint_files)

    def _install(self, module: Any, name: str, weight: str, parts: dict[str, torch.Tensor]) -> None:
        """Make room for a quantized weight of the checkpoint in the module whose parameter ``name`` it is."""
        quantize_module(module, name, self.quantization_config.about(weight), parts)

    def _refuse_converted(self, weight: str, model: Any) -> None:
        """Raise ValueError for a weight that the model's class computes others from."""
        raise ValueError(f"{weight} is converted by {type(model).__name__}, which does not work in 4 bit")

    def _elsewhere(self, places: dict[str, tuple[str, str | None]]) -> set[str]:
        """Tensors of the checkpoint that transformers need not load; ``places``: where weights belong."""
        return set()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.pre_quantized = True
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        modules = list(model.modules())
        for module in modules:
            if isinstance(module, QuantizedWeights):
                dequantize_module(module, dtype)
        for module in modules:
            if isinstance(module, TiedWeight):
                untie_module(module)
        model.__dict__.pop("_tied_weights_keys", None)
        model.tie_weights()
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Saving through transformers would lose the layout; the checkpoint itself is the thing to copy."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Weights in 4 bit have no gradients."""
        return False


def _headers(files: list[str] | None) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint, without its content."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise ValueError("a checkpoint of the halfbyte dialect is loaded from its folder of safetensors files")
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                entry = opened.get_slice(name)
                dtype = DTYPES.get(entry.get_dtype(), torch.uint8)
                tensors[name] = torch.empty(entry.get_shape(), dtype=dtype, device="meta")
    return tensors


def _be_strict(model: Any, elsewhere: set[str]) -> None:
    """Errors, not a report and random weights, for tensors that are missing, misshapen or quantized without a place.

    Tensors that are loaded ``elsewhere`` need no place.
    """
    adjust = model._adjust_missing_and_unexpected_keys
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def adjust_and_check(info: Any) -> None:
        del model._adjust_missing_and_unexpected_keys
        info.unexpected_keys.difference_update(elsewhere)
        left_out = sorted(info.unexpected_keys)
        adjust(info)
        lost = [name for name in sorted(info.unexpected_keys) if name.endswith(tuple(f"_{part}" for part in PARTS))]
        other = [name for name, tensor in model.state_dict().items() if tensor.shape != shapes.get(name, tensor.shape)]
        for what, names in (
            ("the checkpoint lacks", sorted(info.missing_keys)),
            ("the checkpoint has another shape of", other),
            ("the model has no place for", lost),
        ):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ValueError(f"{type(model).__name__}: {what} {', '.join(names[:3])}{more}")
        say_left_out(left_out, type(model).__name__)

    model._adjust_missing_and_unexpected_keys = adjust_and_check


def say_left_out(names: list[str], model: str) -> None:
    """One line of log about tensors that the model's class has no use for."""
    if names:
        kinds = Counter(".".join(name.split(".")[: 2 if name.startswith("model.") else 1]) for name in names)
        counts = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
        logger.warning(
            "%d tensors of the checkpoint are no part of %s and were left out: %s", len(names), model, counts
        )


class HalfbyteConfig(PretrainedConfig):
    """What ``auto_map`` names: importing this file registers the quantizer, the configuration is the stock one."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """The configuration that transformers itself has for this checkpoint."""
        return AutoConfig.from_pretrained(*args, **{**kwargs, "trust_remote_code": False})


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(HalfbyteQuantizationConfig)
    register_quantizer(METHOD)(HalfbyteQuantizer)
