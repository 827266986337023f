"""How a format's weights are described to the compiled products, and their arrays in panels of 16 rows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int8, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import AffineFormat, BlockFormat, Codebook, Format, HiF4Format
from halfbyte.formats.rotation import norm
from halfbyte.kernels.codec import understands

_TABLE, _HIF4, _INT8, _UINT8, _E4M3, _FLOAT = range(6)
_SCALES = {"e4m3": 0, "e8m0": 1, "e3m3": 2, "bf16": 3, "fp32": 4, "fp16": 6}
SCALE_KINDS_BY_DTYPE = {"bfloat16": 3, "float32": 4, "float16": 6}
"""What files hold scales in that are no bytes."""
_E6M2_SCALE = 5
_OFFSETS = {"bias": 1, "zero_point": 2}
_WIDEST = 255  # an integer plus its bias is a byte


class NativeWeight(ctypes.Structure):
    """``hb_weight``."""

    _fields_ = (
        ("lead", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("code_kind", c_int32),
        ("table_count", c_int32),
        ("scale_kind", c_int32),
        ("scale_bits", c_int32),
        ("negate", c_int32),
        ("offset_kind", c_int32),
        ("block", c_int32),
        ("block_rows", c_int32),
        ("center", c_int32),
        ("bias", c_int32),
        ("highest", c_int32),
        ("tables", (c_int8 * 16) * 4),
        ("steps", c_float * 4),
        ("values", c_float * 16),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("global_scale", c_void_p),
        ("divide", c_int32),
        ("row_bias", c_void_p),
        ("rotation", c_int32),
        ("norm", c_float),
        ("swaps", c_void_p),
        ("swap_steps", c_int32),
    )


class NativeDense(ctypes.Structure):
    """``hb_dense``."""

    _fields_ = (
        ("values", c_void_p),
        ("type", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        ("stride", c_int64),
        ("row_bias", c_void_p),
    )


class NativeProduct(ctypes.Structure):
    """``hb_product``."""

    _fields_ = (
        ("x", c_void_p),
        ("x_type", c_int32),
        ("rows", c_int64),
        ("x_stride", c_int64),
        ("y", c_void_p),
        ("y_type", c_int32),
        ("y_stride", c_int64),
        ("mode", c_int32),
    )


class NativeMixture(ctypes.Structure):
    """``hb_mixture``."""

    _fields_ = (
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("experts", c_void_p),
        ("slot_weights", c_void_p),
        ("slots", c_int64),
        ("activation", c_int32),
        ("gated", c_int32),
        ("interleaved", c_int32),
        ("limit", c_float),
        ("alpha", c_float),
    )


def describe_weight(fmt: Format) -> NativeWeight | None:
    """What the products must know of a format, without shapes and arrays; None where they do not know it."""
    if not understands(fmt.plain):
        return None
    weight = _KINDS_OF_FORMATS[type(fmt.plain)](fmt.plain)
    if weight is not None and fmt.rotation:
        columns = fmt.block[1]
        weight.rotation, weight.norm, weight.swap_steps = columns, float(norm(columns)), fmt.rotation.steps
    return weight


def _hif4(fmt: HiF4Format) -> NativeWeight:
    weight = NativeWeight(code_kind=_HIF4, table_count=1, scale_kind=_E6M2_SCALE, block=64, block_rows=1)
    weight.bias, weight.highest, weight.steps[0] = 28, 56, 0.25
    return weight


def _affine(fmt: AffineFormat) -> NativeWeight | None:
    if fmt.bits not in (4, 8) or fmt.group not in (16, 32, 64, 128) or (fmt.bits, fmt.group) == (8, 16):
        return None
    center = 1 << (fmt.bits - 1)
    weight = NativeWeight(table_count=1, scale_kind=_SCALES["bf16"], block=fmt.group, block_rows=1, center=center)
    weight.offset_kind = _OFFSETS[fmt.offset]
    weight.code_kind = _TABLE if fmt.bits == 4 else _UINT8
    weight.bias, weight.highest, weight.steps[0] = center, fmt.levels, 1.0
    if fmt.bits == 4:
        weight.tables[0][:] = [code - center for code in range(16)]
    return weight


def _block(fmt: BlockFormat) -> NativeWeight | None:
    rows, columns = fmt.block_shape
    if columns not in (-1, 16, 32, 64, 128) or fmt.scale.name not in _SCALES:
        return None
    if rows != 1 and (fmt.scale.name != "fp32" or (rows > 0 and rows % 16) or columns == 16):
        return None
    weight = NativeWeight(table_count=1, scale_kind=_SCALES[fmt.scale.name], scale_bits=min(fmt.scale.bits, 8))
    weight.block, weight.block_rows = max(columns, 0), max(rows, 0)
    codebooks: Sequence[Codebook] = fmt.codebooks
    if fmt.scale.name == "e4m3" and (len(codebooks) == 1 or _are_mirrored(codebooks)):
        weight.negate, codebooks = 1, codebooks[:1]
    elif not _selector_fits(fmt):
        return None
    if fmt.bits == 8:
        return _bytes(weight, codebooks[0]) if len(codebooks) == 1 and columns != 16 else None
    return _codebooks(weight, codebooks)


def _selector_fits(fmt: BlockFormat) -> bool:
    """Whether scale and selector fill a byte as the products expect: one bit above seven, or two above six."""
    count = len(fmt.codebooks)
    if fmt.scale.name == "e3m3":
        return count == 4
    return count == 1 or (count in (2, 4) and count << fmt.scale.bits == 256)


def _are_mirrored(codebooks: Sequence[Codebook]) -> bool:
    return len(codebooks) == 2 and bool((codebooks[0].array == -codebooks[1].array).all())


def _bytes(weight: NativeWeight, codebook: Codebook) -> NativeWeight | None:
    if codebook.kind == "int8":
        weight.code_kind, weight.bias, weight.highest, weight.steps[0] = _INT8, 128, _WIDEST, 1.0
        return weight
    if codebook.kind == "e4m3":
        weight.code_kind, weight.steps[0] = _E4M3, 1.0
        return weight
    return None


def _codebooks(weight: NativeWeight, codebooks: Sequence[Codebook]) -> NativeWeight | None:
    steps = [float(np.abs(c.array[c.array != 0]).min()) for c in codebooks]
    integers = [_integers(c, min(steps)) for c in codebooks]
    if any(i is None for i in integers):
        integers = [_integers(c, step) for c, step in zip(codebooks, steps, strict=True)]
    else:
        steps = [min(steps)] * len(codebooks)
    weight.table_count = len(codebooks)
    known = [i for i in integers if i is not None]
    if len(known) < len(codebooks):
        if len(codebooks) > 1:
            return None
        weight.code_kind, weight.steps[0] = _FLOAT, 1.0
        weight.values[:] = codebooks[0].array.tolist()
        return weight
    if len(codebooks) > 1 and weight.block != 16:
        return None
    weight.bias = max(0, -min(int(i.min()) for i in known))
    weight.highest = weight.bias + max(int(i.max()) for i in known)
    for t, (table, step) in enumerate(zip(known, steps, strict=True)):
        weight.tables[t][:] = table.tolist()
        weight.steps[t] = step
    return weight


def _integers(codebook: Codebook, step: float) -> NDArray[np.int64] | None:
    """A codebook's values in steps, where these are whole and fit into a byte."""
    exact = codebook.array.astype(np.float64) / step
    whole = np.rint(exact).astype(np.int64)
    if np.abs(exact - whole).max() > 1e-6 * np.abs(exact).max() or np.abs(whole).max() > 127:
        return None
    return whole if np.ptp(whole) <= _WIDEST else None


_KINDS_OF_FORMATS: dict[type, Callable[[Any], NativeWeight | None]] = {
    BlockFormat: _block,
    AffineFormat: _affine,
    HiF4Format: _hif4,
}
