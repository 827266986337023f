"""compressed-tensors: what vLLM, SGLang and transformers load (FORMATS of that library, version 0.20).

Per module P: ``P.weight_packed``, ``P.weight_scale`` and, as the format wants, ``P.weight_global_scale`` (a divisor,
[1]), ``P.weight_shape``, ``P.weight_zero_point``; FP8 keeps the name ``P.weight``. Experts are written one by one.
Of rotations the library has the Hadamard matrix (``transform_config``, and ``P.<name>_input.weight`` holds it).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np

from halfbyte.checkpoint import Inventory, TensorInfo
from halfbyte.dialects.compressed_tensors_config import (
    CACHE,
    SPELLINGS,
    Schemes,
    activation_arguments,
    plain_name,
    quantization_config,
    transform_name,
)
from halfbyte.dialects.dialect import Dialect, register_dialect
from halfbyte.dialects.module_patterns import spaces
from halfbyte.dialects.modules import Module, is_linear, module_problem, modules, scaled_modules, stored_bytes
from halfbyte.dialects.outputs import Array, CacheScales, InputScale, OutputTensor
from halfbyte.dialects.quantization_config import quantization_config_of
from halfbyte.errors import CheckpointError
from halfbyte.formats import AffineFormat, BlockFormat, Format, rotation_of
from halfbyte.formats.rotation import hadamard_matrix
from halfbyte.models import Weight


class CompressedTensorsDialect(Dialect):
    """NVFP4, MixFP4, MXFP4, INT4, FP8 and MXFP8, and mixtures of them."""

    name = "compressed-tensors"
    about = "vLLM, SGLang, transformers"
    global_scale_inv = True
    input_scales = (".input_global_scale", ".input_scale")
    cache_scales = CacheScales((".k_scale", ".v_scale"), "BF16", (1,), CACHE)

    def __init__(self, activations: Mapping[str, Any] | None = None) -> None:
        self.activations = activations or {}

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Formats that the library has no compressor for, and weights that are no modules."""
        rotation = rotation_of(fmt)
        if plain_name(fmt) not in SPELLINGS or (rotation and rotation.steps):
            return f"compressed-tensors has no spelling for {fmt.name}; use the dialect halfbyte"
        if rotation and len(weight.shape) > 2:
            return "engines rotate no inputs of experts; use the dialect halfbyte, or leave experts as they are"
        return module_problem(weight, fmt, self.name)

    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """Per module, in the library's names."""
        return [output for module in modules(weight) for output in _outputs(module, fmt)]

    def pack(self, output: OutputTensor, part: Array, fmt: Format) -> Array:
        """INT4 nibbles are viewed as words; zero points are packed along the rows."""
        if output.part == "offsets":
            return _pack_rows(part)
        if output.dtype == "I32":
            return np.ascontiguousarray(part).view("<i4")
        return part.reshape(output.shape) if output.part == "global_scale" else part

    def unpack(self, output: OutputTensor, stored: Array, fmt: Format, shape: tuple[int, ...]) -> Array:
        """The inverse."""
        if output.part == "offsets":
            return _unpack_rows(stored, shape[-2]).reshape(shape)
        return stored_bytes(stored).reshape(shape)

    def config(self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight]) -> dict[str, Any]:
        """Config groups with unanchored patterns, and the ignore list."""
        static = scaled_modules(kept, self.input_scales)
        by_format: dict[tuple[str, str], list[str]] = {}
        # transformers takes the first pattern that contains "experts", which those of shared experts may do
        for weight, fmt in sorted(quantized, key=lambda pair: len(pair[0].shape) == 2):
            names = [m.name for m in modules(weight, one_expert=True)]
            inputs = activation_arguments(fmt.name, self.activations.get(weight.name), names[0] in static)
            by_format.setdefault((fmt.name, json.dumps(inputs, sort_keys=True)), []).extend(names)
        groups = [(name, json.loads(inputs), members) for (name, inputs), members in by_format.items()]
        taken = spaces(w for w, _ in quantized)
        whole = sorted(spaces(kept) - taken)
        apart = tuple(f"{space}." for space in whole)
        linear = [w for w in kept if is_linear(w) and not w.name.removeprefix("model.").startswith(apart)]
        ignored = [m.name for weight in linear for m in modules(weight, one_expert=True)]
        return quantization_config(groups, ignored, whole, sorted(taken))

    def notes(self, quantized: Sequence[tuple[Weight, Format]]) -> list[str]:
        """What engines that are out now do not load, or load wrongly."""
        stacks: dict[str, list[Format]] = {}
        for weight, fmt in quantized:
            if len(weight.shape) == 3:
                stacks.setdefault(weight.name.rpartition(".")[0], []).append(fmt)
        notes = []
        if any(len(found) < 2 or len(set(found)) > 1 for found in stacks.values()):
            notes.append("vLLM wants all projections of a layer's experts in one format; here some differ or are kept")
        scaled = (fmt for found in stacks.values() for fmt in found if isinstance(fmt, BlockFormat))
        if any(fmt.has_global_scale for fmt in scaled):
            notes.append(
                "transformers (to 5.23) ignores the global scales of experts in compressed-tensors; vLLM does not"
            )
        if any(rotation_of(fmt) for _, fmt in quantized):
            notes.append(
                "transformers (to 5.23) ignores transform_config and computes nonsense; vLLM has kernels for it on GPUs"
            )
        if any(plain_name(fmt) == "mixfp4" for _, fmt in quantized):
            notes.append(
                "compressed-tensors (to 0.20) does not know mixfp4-pack-quantized; engines need MixFP4 support"
            )
        return notes

    def input_scale(self, fmt: Format) -> InputScale | None:
        """NVFP4 stores a divisor, FP8 a multiplier."""
        if rotation_of(fmt):
            return None
        known = {"nvfp4": InputScale(".input_global_scale", True, (1,))}
        known |= dict.fromkeys(("fp8_tensor", "fp8_channel"), InputScale(".input_scale", False, (1,)))
        return known.get(fmt.name)

    def activations_problem(self, fmt: Format, kind: str) -> str | None:
        """Engines have kernels for some pairs only."""
        known = SPELLINGS[plain_name(fmt)][2]
        if kind == "static" and rotation_of(fmt):
            return f"scales of rotated activations ({fmt.name}) are not calibrated; use dynamic ones or none"
        if kind in known:
            return None
        return f"engines take no {kind} activations beside {fmt.name} in {self.name}, only {' or '.join(known)}"

    def activations_of(self, inventory: Inventory, weight: Weight) -> dict[str, Any] | None:
        """``input_activations`` of its group."""
        return _schemes(inventory).inputs_of(next(modules(weight, one_expert=True)).name)

    def with_activations(self, kinds: Mapping[str, Any]) -> Dialect:
        """The arguments go to the groups."""
        return CompressedTensorsDialect(kinds)

    def claims(self, inventory: Inventory) -> bool:
        """By ``quant_method``."""
        return quantization_config_of(inventory).get("quant_method") == self.name

    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """Replace each module's tensors by its weight."""
        schemes = _schemes(inventory)
        formats: dict[str, Format] = {}
        companions: set[str] = set()
        for name, info in inventory.tensors.items():
            module, _, last = name.rpartition(".")
            if last == "weight_packed" or (last == "weight" and info.dtype == "F8_E4M3"):
                fmt = formats[name] = schemes.format_of(module)
                companions.update([module + suffix for suffix in _suffixes(fmt)])
            elif last == "weight_g_idx":
                raise CheckpointError(f"{name} reorders columns (actorder: group), which cannot be read")
        tensors: dict[str, TensorInfo] = {}
        by_weight: dict[str, Format] = {}
        for name, info in inventory.tensors.items():
            if name in formats:
                weight = name.removesuffix("_packed")
                widen = {"U8": 2, "I32": 8}.get(info.dtype, 1)
                shape = (*info.shape[:-1], info.shape[-1] * widen)
                tensors[weight] = TensorInfo(weight, "BF16", shape, info.file, info.offset, info.nbytes)
                by_weight[weight] = formats[name]
            elif name not in companions:
                tensors[name] = info
        return tensors, by_weight


@lru_cache(maxsize=1)
def _schemes(inventory: Inventory) -> Schemes:
    return Schemes(quantization_config_of(inventory), inventory.source)


def _outputs(module: Module, fmt: Format) -> Iterator[OutputTensor]:
    return (_fp8_outputs if fmt.name.startswith(("fp8", "mxfp8")) else _packed_outputs)(module, fmt)


def _packed_outputs(m: Module, fmt: Format) -> Iterator[OutputTensor]:
    columns = fmt.block[1]
    if rotation_of(fmt):
        name = f"{m.name}.{transform_name(columns)}_input.weight"
        yield OutputTensor(name, "BF16", (columns, columns), "hadamard", m.expert, None, 0, _hadamard(columns))
    if fmt.name.startswith("int4"):
        yield OutputTensor(f"{m.name}.weight_packed", "I32", (m.n, m.k // 8), "codes", m.expert, m.rows)
        yield OutputTensor(f"{m.name}.weight_scale", "BF16", (m.n, m.k // columns), "scales", m.expert, m.rows)
        yield OutputTensor(f"{m.name}.weight_shape", "I64", (2,), "shape", m.expert, None, 0, (m.n, m.k))
        if isinstance(fmt, AffineFormat):
            shape = (math.ceil(m.n / 8), m.k // columns)
            yield OutputTensor(f"{m.name}.weight_zero_point", "I32", shape, "offsets", m.expert, m.rows, 8)
        return
    scale_dtype = "U8" if plain_name(fmt) == "mxfp4" else "F8_E4M3"
    yield OutputTensor(f"{m.name}.weight_packed", "U8", (m.n, m.k // 2), "codes", m.expert, m.rows)
    yield OutputTensor(f"{m.name}.weight_scale", scale_dtype, (m.n, m.k // columns), "scales", m.expert, m.rows)
    if isinstance(fmt, BlockFormat) and fmt.has_global_scale:
        yield OutputTensor(f"{m.name}.weight_global_scale", "F32", (1,), "global_scale", m.expert, None, 0)


def _fp8_outputs(m: Module, fmt: Format) -> Iterator[OutputTensor]:
    assert isinstance(fmt, BlockFormat)
    yield OutputTensor(f"{m.name}.weight", "F8_E4M3", (m.n, m.k), "codes", m.expert, m.rows)
    dtype = {"fp8_channel": "BF16", "mxfp8": "U8"}.get(fmt.name, "F32")
    shape = fmt.scales_shape((m.n, m.k))
    rows = fmt.block[0]
    if rows < 0:
        yield OutputTensor(f"{m.name}.weight_scale", dtype, (1,), "scales", m.expert, None, 0)
    else:
        yield OutputTensor(f"{m.name}.weight_scale", dtype, shape, "scales", m.expert, m.rows, rows)


@cache
def _hadamard(size: int) -> tuple[float, ...]:
    """Not normalised, as the library stores it."""
    return tuple(float(value) for value in np.sign(hadamard_matrix(size)).flat)


@cache
def _suffixes(fmt: Format) -> tuple[str, ...]:
    """What the tensors of a module are called, after the module's name."""
    return tuple(output.name for output in _outputs(Module("", None, None, 128, 128), fmt))


def _pack_rows(codes: Array) -> Array:
    """Zero points [N, G] (0..15) as int32 words of 8 rows each, [ceil(N / 8), G]."""
    padded = np.pad(codes, ((0, -len(codes) % 8), (0, 0))).astype(np.uint32).reshape(-1, 8, codes.shape[1])
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[None, :, None]
    return np.bitwise_or.reduce(padded << shifts, axis=1).view("<i4")


def _unpack_rows(words: Array, n: int) -> Array:
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[None, :, None]
    codes = (words.view(np.uint32)[:, None, :] >> shifts) & np.uint32(15)
    return codes.reshape(-1, words.shape[1])[:n].astype(np.uint8)


COMPRESSED_TENSORS = register_dialect(CompressedTensorsDialect())
