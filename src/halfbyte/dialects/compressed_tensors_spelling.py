"""The modules of compressed-tensors.

Per module P: ``P.weight_packed``, ``P.weight_scale`` and, as the format wants, ``P.weight_global_scale`` (a divisor,
[1]), ``P.weight_shape``, ``P.weight_zero_point``; FP8 keeps the name ``P.weight``. Experts are written one by one.
Of rotations the library has the Hadamard matrix (``transform_config``, and ``P.<name>_input.weight`` holds it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np

from halfbyte.checkpoint import Inventory
from halfbyte.dialects.compressed_tensors_config import Schemes, transform_name
from halfbyte.dialects.module_spelling import ModulePart, ModuleSpelling, Table
from halfbyte.dialects.outputs import Array, OutputTensor
from halfbyte.dialects.quantization_config import quantization_fields
from halfbyte.errors import CheckpointError
from halfbyte.formats import Format
from halfbyte.formats.rotation import hadamard_matrix
from halfbyte.models import Weight

_GROUPS = (16, 32, 64, 128)
_CODES, _SCALES = (".weight_packed", "U8"), ".weight_scale"
_NVFP4: Table = {
    "codes": _CODES,
    "scales": (_SCALES, "F8_E4M3"),
    "global_scale": ModulePart(".weight_global_scale", "F32", lambda shape: (1,)),
}
_INT4: Table = {
    "codes": (".weight_packed", "I32"),
    "scales": (_SCALES, "BF16"),
    "shape": ModulePart(".weight_shape", "I64", lambda shape: (2,), content=lambda n, k: (n, k)),
}
_INT4_ASYMMETRIC: Table = {
    **_INT4,
    # eight rows in a word
    "offsets": ModulePart(".weight_zero_point", "I32", lambda shape: (math.ceil(shape[0] / 8), shape[1]), 8),
}
_FP8 = (".weight", "F8_E4M3")


class CompressedTensorsSpelling(ModuleSpelling):
    """Tensors as the library (0.20) names, packs and types them."""

    global_scale_inv = True

    def __init__(self) -> None:
        tables: dict[str, Table] = {
            "nvfp4": _NVFP4,
            "mixfp4": _NVFP4,
            "mxfp4": {"codes": _CODES, "scales": (_SCALES, "U8")},
            **{f"int4_g{group}": _INT4 for group in _GROUPS},
            **{f"int4_asym_g{group}": _INT4_ASYMMETRIC for group in _GROUPS},
            "fp8_channel": {"codes": _FP8, "scales": (_SCALES, "BF16")},
            "fp8_tensor": {"codes": _FP8, "scales": ModulePart(_SCALES, "F32", lambda shape: (1,))},
            "fp8_block128": {"codes": _FP8, "scales": (_SCALES, "F32")},
            "mxfp8": {"codes": _FP8, "scales": (_SCALES, "U8")},
        }
        super().__init__("compressed-tensors", tables)

    def parts(self, fmt: Format) -> dict[str, ModulePart]:
        """Return the parts of the format without its rotation, after the matrix of the rotation."""
        parts = self.tables.get(fmt.plain.name, {})
        if fmt.rotation is None:
            return parts
        if not parts or fmt.rotation.steps:
            return {}
        return {"hadamard": _hadamard_part(fmt.block[1]), **parts}

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Refuse formats that the library has no compressor for, rotated experts, and weights that are no modules."""
        if self.parts(fmt) and fmt.rotation and len(weight.shape) > 2:
            return "engines rotate no inputs of experts; use the dialect halfbyte, or leave experts as they are"
        return super().problem(weight, fmt)

    def pack(self, output: OutputTensor, part: Array, fmt: Format) -> Array:
        """Pack zero points along the rows, and INT4 nibbles into words."""
        return _pack_rows(part) if output.part == "offsets" else super().pack(output, part, fmt)

    def unpack(self, output: OutputTensor, stored: Array, fmt: Format, shape: tuple[int, ...]) -> Array:
        """Unpack zero points and words: the inverse of ``pack``."""
        if output.part == "offsets":
            return _unpack_rows(stored, shape[-2]).reshape(shape)
        return super().unpack(output, stored, fmt, shape)

    def format_reader(self, inventory: Inventory) -> Callable[[str], Format]:
        """Read formats from the config groups."""
        reordered = next((name for name in inventory.tensors if name.endswith(".weight_g_idx")), None)
        if reordered:
            raise CheckpointError(f"{reordered} reorders columns (actorder: group), which cannot be read")
        return schemes(inventory).format_of


@lru_cache(maxsize=1)
def schemes(inventory: Inventory) -> Schemes:
    """Return the schemes of a checkpoint's configuration."""
    return Schemes(quantization_fields(inventory), inventory.source)


@cache
def _hadamard_part(size: int) -> ModulePart:
    # not normalised, as the library stores it
    matrix = tuple(float(value) for value in np.sign(hadamard_matrix(size)).flat)
    ending = f".{transform_name(size)}_input.weight"
    return ModulePart(ending, "BF16", lambda shape: (size, size), content=lambda n, k: matrix)


def _pack_rows(codes: Array) -> Array:
    """Pack zero points [N, G] (0..15) into int32 words of 8 rows each, [ceil(N / 8), G]."""
    padded = np.pad(codes, ((0, -len(codes) % 8), (0, 0))).astype(np.uint32).reshape(-1, 8, codes.shape[1])
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[None, :, None]
    return np.bitwise_or.reduce(padded << shifts, axis=1).view("<i4")


def _unpack_rows(words: Array, n: int) -> Array:
    """Unpack the zero points [N, G] of ``n`` rows."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[None, :, None]
    codes = (words.view(np.uint32)[:, None, :] >> shifts) & np.uint32(15)
    return codes.reshape(-1, words.shape[1])[:n].astype(np.uint8)
