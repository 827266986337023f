"""NVIDIA ModelOpt (0.47): what TensorRT-LLM, vLLM, SGLang and llama.cpp's converter load.

Per module P: ``P.weight`` (U8 for 4 bit, F8_E4M3), ``P.weight_scale``, for NVFP4 ``P.weight_scale_2`` (F32 [], a
multiplier) and, where activations are quantized with calibrated scales, ``P.input_scale`` (F32 [], a multiplier).
The scales of an FP8 KV cache lie under the projections that make keys and values.
Experts are written one by one. The configuration stands in config.json and, once more, in hf_quant_config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from halfbyte.checkpoint import Inventory, TensorInfo
from halfbyte.dialects.dialect import Dialect, register_dialect
from halfbyte.dialects.modelopt_config import CACHE, FILE, Algorithms, config_file, quantization_config, settings_of
from halfbyte.dialects.module_patterns import spaces
from halfbyte.dialects.modules import Module, is_linear, module_problem, modules, scaled_modules, stored_bytes
from halfbyte.dialects.outputs import Array, CacheScales, InputScale, OutputTensor
from halfbyte.errors import CheckpointError
from halfbyte.formats import BlockFormat, Format
from halfbyte.models import Weight

_WRITTEN = ("nvfp4", "fp8_channel", "fp8_block128", "mxfp8")
_PARTS = ("weight_scale", "weight_scale_2")


class ModelOptDialect(Dialect):
    """NVFP4, FP8 per channel and per block, MXFP8, and mixtures; reads FP8 per tensor and MXFP4 too."""

    name = "modelopt"
    about = "NVIDIA ModelOpt: TensorRT-LLM, vLLM, SGLang"
    files = (FILE,)
    input_scales = (".input_scale",)
    cache_scales = CacheScales((".k_proj.k_scale", ".v_proj.v_scale"), "F32", (), CACHE)

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Formats that engines read in this spelling without calibrated activations, weights of modules."""
        if fmt.name == "fp8_tensor":
            return "engines read modelopt's FP8 per tensor with calibrated input scales only; choose fp8_channel"
        if fmt.name not in _WRITTEN:
            return f"modelopt has no spelling for {fmt.name} that engines read; use the dialect halfbyte"
        if fmt.name == "fp8_block128" and weight.shape[-1] % 128:
            return f"modelopt's FP8 blocks need K in multiples of 128, and {weight.name} has {weight.shape[-1]}"
        return module_problem(weight, fmt, self.name)

    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """Per module, in modelopt's names."""
        assert isinstance(fmt, BlockFormat)
        return [output for module in modules(weight) for output in _outputs(module, fmt)]

    def pack(self, output: OutputTensor, part: Array, fmt: Format) -> Array:
        """The same bytes."""
        return part

    def unpack(self, output: OutputTensor, stored: Array, fmt: Format, shape: tuple[int, ...]) -> Array:
        """The same bytes."""
        return stored_bytes(stored).reshape(shape)

    def config(self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight]) -> dict[str, Any]:
        """One algorithm for all modules, or a map from modules to algorithms; patterns of what is left out."""
        static = scaled_modules(kept, self.input_scales)
        layers: dict[tuple[str, bool], list[str]] = {}
        for weight, fmt in quantized:
            names = [m.name for m in modules(weight)]
            layers.setdefault((fmt.name, names[0] in static), []).extend(names)
        whole = spaces(kept) - spaces(w for w, _ in quantized)
        return quantization_config(layers, sorted(set(_excluded(kept, whole))))

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, bytes]:
        """hf_quant_config.json."""
        return {FILE: config_file(config)}

    def input_scale(self, fmt: Format) -> InputScale | None:
        """A multiplier."""
        return InputScale(".input_scale", False, ()) if fmt.name in ("nvfp4", "fp8_tensor") else None

    def activations_problem(self, fmt: Format, kind: str) -> str | None:
        """Calibrated scales are what its engines know."""
        return None if kind == "static" and self.input_scale(fmt) else super().activations_problem(fmt, kind)

    def inherited(self, inventory: Inventory) -> dict[str, Any]:
        """The scheme of the KV cache."""
        settings = settings_of(inventory)
        if str(settings.get("kv_cache_quant_algo")).upper() == "FP8":
            return {"kv_cache_scheme": dict(CACHE)}
        scheme = settings.get("kv_cache_scheme") or settings.get("kv_cache_quant_algo")
        return {"kv_cache_scheme": scheme} if scheme else {}

    def claims(self, inventory: Inventory) -> bool:
        """By ``quant_method``, or by hf_quant_config.json alone."""
        return bool(settings_of(inventory))

    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """Replace each module's tensors by its weight."""
        algorithms = Algorithms(settings_of(inventory), inventory.source)
        tensors: dict[str, TensorInfo] = {}
        formats: dict[str, Format] = {}
        companions: set[str] = set()
        for name, info in inventory.tensors.items():
            if info.dtype not in ("U8", "F8_E4M3") or name.endswith("_scale"):
                continue
            module = name.removesuffix(".weight")
            if module == name or f"{module}.weight_scale" not in inventory.tensors:
                raise CheckpointError(f"{name} ({info.dtype}) in {inventory.source} has no {name}_scale beside it")
            if f"{module}.pre_quant_scale" in inventory.tensors:
                raise CheckpointError(
                    f"{name} in {inventory.source} is smoothed (pre_quant_scale), which cannot be read; "
                    "start from a checkpoint without AWQ or SVDQuant"
                )
            formats[name] = algorithms.format_of(module)
            companions.update(f"{module}.{part}" for part in _PARTS)
        for name, info in inventory.tensors.items():
            if name in formats:
                shape = (*info.shape[:-1], info.shape[-1] * (2 if info.dtype == "U8" else 1))
                tensors[name] = TensorInfo(name, "BF16", shape, info.file, info.offset, info.nbytes)
            elif name not in companions:
                tensors[name] = info
        return tensors, formats


def _outputs(m: Module, fmt: BlockFormat) -> Iterator[OutputTensor]:
    four = fmt.bits == 4
    width = m.k // 2 if four else m.k
    yield OutputTensor(f"{m.name}.weight", "U8" if four else "F8_E4M3", (m.n, width), "codes", m.expert, m.rows)
    name = f"{m.name}.weight_scale"
    rows, columns = fmt.block
    if rows < 0:
        yield OutputTensor(name, "F32", (), "scales", m.expert, None, 0)
    elif columns < 0:
        yield OutputTensor(name, "F32", (m.n,), "scales", m.expert, m.rows)
    elif rows > 1:
        grid = fmt.scales_shape((m.n, m.k))
        yield OutputTensor(name, "F32", (grid[0], 1, grid[1], 1), "scales", m.expert, m.rows, rows)
    else:
        dtype = "F8_E4M3" if fmt.has_global_scale else "U8"
        yield OutputTensor(name, dtype, (m.n, m.k // columns), "scales", m.expert, m.rows)
    if fmt.has_global_scale:
        yield OutputTensor(f"{m.name}.weight_scale_2", "F32", (), "global_scale", m.expert, None, 0)


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
