"""NVIDIA ModelOpt (0.47): what TensorRT-LLM, vLLM, SGLang and llama.cpp's converter load.

Per module P: ``P.weight`` (U8 for 4 bit, F8_E4M3), ``P.weight_scale``, for NVFP4 ``P.weight_scale_2`` (F32 [], a
multiplier) and, where activations are quantized with calibrated scales, ``P.input_scale`` (F32 [], a multiplier).
The scales of an FP8 KV cache lie under the projections that make keys and values.
Experts are written one by one. The configuration stands in config.json and, once more, in hf_quant_config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from halfbyte.checkpoint import Inventory
from halfbyte.dialects.capabilities import ActivationScales, Package
from halfbyte.dialects.declared import Declared
from halfbyte.dialects.dialect import Dialect, register_dialect
from halfbyte.dialects.modelopt_config import (
    CACHE,
    FILE,
    Algorithms,
    config_file,
    quantization_config,
    settings_fields,
    settings_of,
)
from halfbyte.dialects.module_patterns import spaces
from halfbyte.dialects.module_spelling import ModulePart, ModuleSpelling
from halfbyte.dialects.modules import is_linear, modules, scaled_modules
from halfbyte.dialects.outputs import CacheScales, InputScale
from halfbyte.errors import CheckpointError
from halfbyte.formats import Format
from halfbyte.models import Weight

_FOUR_BITS, _EIGHT_BITS, _SCALES = (".weight", "U8"), (".weight", "F8_E4M3"), ".weight_scale"
# algorithms whose inputs have one calibrated scale
_STATIC = ("NVFP4", "FP8")
_READ_ONLY = ("fp8_tensor", "mxfp4")


class ModelOptSpelling(ModuleSpelling):
    """NVFP4, FP8 per channel and per block, MXFP8; reads FP8 per tensor and MXFP4 too."""

    def __init__(self) -> None:
        super().__init__(
            "modelopt",
            {
                "nvfp4": {
                    "codes": _FOUR_BITS,
                    "scales": (_SCALES, "F8_E4M3"),
                    "global_scale": ModulePart(".weight_scale_2", "F32", lambda shape: ()),
                },
                "mxfp4": {"codes": _FOUR_BITS, "scales": (_SCALES, "U8")},
                "mxfp8": {"codes": _EIGHT_BITS, "scales": (_SCALES, "U8")},
                "fp8_tensor": {"codes": _EIGHT_BITS, "scales": ModulePart(_SCALES, "F32", lambda shape: ())},
                "fp8_channel": {"codes": _EIGHT_BITS, "scales": ModulePart(_SCALES, "F32", lambda shape: shape[:1])},
                "fp8_block128": {
                    "codes": _EIGHT_BITS,
                    "scales": ModulePart(_SCALES, "F32", lambda shape: (shape[0], 1, shape[1], 1)),
                },
            },
        )

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Refuse formats that engines do not read in this spelling without calibrated activations."""
        if fmt.name == "fp8_tensor":
            return "engines read modelopt's FP8 per tensor with calibrated input scales only; choose fp8_channel"
        if fmt.name in _READ_ONLY or not self.parts(fmt):
            return f"modelopt has no spelling for {fmt.name} that engines read; use the dialect halfbyte"
        if fmt.name == "fp8_block128" and weight.shape[-1] % 128:
            return f"modelopt's FP8 blocks need K in multiples of 128, and {weight.name} has {weight.shape[-1]}"
        return super().problem(weight, fmt)

    def format_reader(self, inventory: Inventory) -> Callable[[str], Format]:
        """Read formats from the algorithms; CheckpointError for codes that cannot be understood."""
        for name, info in inventory.tensors.items():
            if info.dtype in ("U8", "F8_E4M3") and not name.endswith("_scale"):
                _check_codes(name, info.dtype, inventory)
        return Algorithms(settings_fields(inventory), inventory.source).format_of


class ModelOptActivations(ActivationScales):
    """Calibrated scales, which are multipliers."""

    endings = (".input_scale",)

    def scale(self, fmt: Format) -> InputScale | None:
        """Return the scale that engines use beside NVFP4 and FP8 per tensor."""
        return InputScale(".input_scale", False, ()) if fmt.name in ("nvfp4", "fp8_tensor") else None

    def problem(self, fmt: Format, kind: str) -> str | None:
        """Refuse all but calibrated scales."""
        return None if kind == "static" and self.scale(fmt) else super().problem(fmt, kind)

    def takes_scales(self, inventory: Inventory) -> Callable[[Weight, Format, str], bool]:
        """Ask the module's algorithm, and whether any group quantizes inputs at all."""
        settings = settings_fields(inventory)
        groups = [group for _, group in settings.fields("config_groups").members()]
        weight_only = bool(groups) and not any("input_activations" in group for group in groups)
        layers = settings.fields("quantized_layers")

        def takes(weight: Weight, fmt: Format, module: str) -> bool:
            stated = layers.fields(module) if module in layers else settings
            return bool(self.scale(fmt)) and not weight_only and stated.text("quant_algo").upper() in _STATIC

        return takes


class ModelOptPackage(Package):
    """Beside config.json the same settings in hf_quant_config.json."""

    files = (FILE,)

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, bytes]:
        """Return hf_quant_config.json for a ``quantization_config``."""
        return {FILE: config_file(config)}

    def inherited(self, inventory: Inventory) -> dict[str, Any]:
        """Return the scheme of the KV cache, which older files state as an algorithm."""
        settings = settings_of(inventory)
        if str(settings.get("kv_cache_quant_algo")).upper() == "FP8":
            return {"kv_cache_scheme": dict(CACHE)}
        scheme = settings.get("kv_cache_scheme") or settings.get("kv_cache_quant_algo")
        return {"kv_cache_scheme": scheme} if scheme else {}


class ModelOptDialect(Dialect):
    """NVFP4, FP8 per channel and per block, MXFP8, and mixtures of them."""

    name = "modelopt"
    about = "NVIDIA ModelOpt: TensorRT-LLM, vLLM, SGLang"
    spelling = ModelOptSpelling()
    activations = ModelOptActivations()
    cache_scales = CacheScales((".k_proj.k_scale", ".v_proj.v_scale"), "F32", (), CACHE)
    package = ModelOptPackage()

    def claims(self, inventory: Inventory) -> bool:
        """Recognise a checkpoint by its ``quant_method``, or by hf_quant_config.json alone."""
        return bool(settings_of(inventory))

    def declared(self, inventory: Inventory) -> Declared:
        """Return the wildcards of what is left out, and the modules that a mixture names."""
        settings = settings_fields(inventory)
        entries = dict.fromkeys([*settings.texts("ignore"), *settings.texts("exclude_modules")])
        named = frozenset(settings.fields("quantized_layers").values) if "quantized_layers" in settings else None
        return Declared(tuple(entries), None, named, True)

    def config(
        self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight], activations: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return one algorithm for all modules, or a map from modules to algorithms; patterns of what is left out."""
        static = scaled_modules(kept, self.activations.endings)
        layers: dict[tuple[str, bool], list[str]] = {}
        for weight, fmt in quantized:
            names = [m.name for m in modules(weight)]
            layers.setdefault((fmt.name, names[0] in static), []).extend(names)
        whole = spaces(kept) - spaces(w for w, _ in quantized)
        return quantization_config(layers, sorted(set(_excluded(kept, whole))))


def _check_codes(name: str, dtype: str, inventory: Inventory) -> None:
    module = name.removesuffix(".weight")
    if module == name or f"{module}.weight_scale" not in inventory.tensors:
        raise CheckpointError(f"{name} ({dtype}) in {inventory.source} has no {name}_scale beside it")
    if f"{module}.pre_quant_scale" in inventory.tensors:
        raise CheckpointError(
            f"{name} in {inventory.source} is smoothed (pre_quant_scale), which cannot be read; "
            "start from a checkpoint without AWQ or SVDQuant"
        )


def _excluded(kept: Sequence[Weight], whole: set[str]) -> Iterator[str]:
    """Wildcards of modules that stay as they are: whole spaces and stacks, single matrices by name."""
    for weight in kept:
        first = weight.name.removeprefix("model.").split(".", 1)[0]
        if first in whole:
            yield f"{weight.name[: weight.name.index(first)]}{first}*"
        elif is_linear(weight):
            stacked = len(weight.shape) == 3
            yield f"{weight.name.rsplit('.', 1)[0]}*" if stacked else weight.name.removesuffix(".weight")


MODELOPT = register_dialect(ModelOptDialect())
