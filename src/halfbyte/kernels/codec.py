"""A format and a search as the native code sees them: one flat structure of numbers."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from typing import Protocol

import ml_dtypes
import numpy as np

from halfbyte.formats import AffineFormat, BlockFormat, Format, HiF4Format
from halfbyte.formats.codebooks import Codebook

_KINDS = {
    "e2m1": 0,
    "int_sign_magnitude": 1,
    "int_twos_complement": 2,
    "if4_int": 3,
    "int_offset": 4,
    "e4m3": 5,
    "e2m1_special": 6,
}
_LADDER = 7
_SCALES = {"e4m3": 0, "e8m0": 1, "e3m3": 2, "bf16": 3, "fp32": 4}
_METRICS = {"sse": 0, "mae": 1, "max": 2}
_RULES = {"floor": 0, "even": 1, "rceil": 2}
_FAR = 1 << 20  # beyond any scale code


class SearchLike(Protocol):
    """What the kernels need to know of a search (``halfbyte.search.Search``)."""

    @property
    def offsets(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def power_offsets(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def int_ratios(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def float_ratios(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def shrink(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def metric(self) -> str: ...  # noqa: D102
    @property
    def rule(self) -> str: ...  # noqa: D102
    @property
    def only(self) -> str: ...  # noqa: D102
    def __hash__(self) -> int: ...


class NativeCodebook(ctypes.Structure):
    """``hb_table``."""

    _fields_ = (
        ("kind", c_int32),
        ("top", c_float),
        ("lowest", c_float),
        ("highest", c_float),
        ("limit", c_float),
        ("exponent", c_int32),
        ("even_from", c_float),
        ("rceil_from", c_float),
        ("high", c_int32),
        ("zero_code", c_int32),
        ("thresholds", c_float * 16),
        ("ladder_values", c_float * 16),
        ("ladder_codes", c_int32 * 16),
        ("values", c_float * 256),
    )


class NativeCodec(ctypes.Structure):
    """``hb_codec``."""

    _fields_ = (
        ("family", c_int32),
        ("bits", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("scale_kind", c_int32),
        ("scale_bits", c_int32),
        ("scale_low", c_int32),
        ("codebook_count", c_int32),
        ("order", c_int32 * 4),
        ("shared_base", c_int32),
        ("four_over_six", c_int32),
        ("metric", c_int32),
        ("rule", c_int32),
        ("single", c_int32),
        ("offset_count", c_int32),
        ("ratio_count", c_int32),
        ("offsets", c_int32 * 256),
        ("above", c_int32 * 256),
        ("below", c_int32 * 256),
        ("ratios", c_float * 64),
        ("levels", c_int32),
        ("codebooks", NativeCodebook * 4),
    )


class NativeStats(ctypes.Structure):
    """``hb_stats``."""

    _fields_ = (
        ("squared_error", c_double),
        ("squares", c_double),
        ("max_error", c_double),
        ("saturated", c_int64),
        ("blocks", c_int64 * 4),
    )


class NativeTask(ctypes.Structure):
    """``hb_task``."""

    _fields_ = (
        ("x", c_void_p),
        ("type", c_int32),
        ("lead", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("global_scale", c_void_p),
        ("global_scale_inv", c_void_p),
        ("weights", c_void_p),
        ("weight_lead", c_int64),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("stats", c_void_p),
    )


class NativeGptq(ctypes.Structure):
    """``hb_gptq_task``."""

    _fields_ = (
        ("x", c_void_p),
        ("type", c_int32),
        ("lead", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("global_scale", c_void_p),
        ("judge_feedback", c_int32),
        ("judge", c_void_p),
        ("gain", c_void_p),
        ("inner", c_void_p),
        ("outer", c_void_p),
        ("block_of", c_void_p),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
    )


@lru_cache(maxsize=256)
def describe(fmt: Format, search: SearchLike | None) -> NativeCodec | None:
    """The structure for a format and a search (None: for decoding), or None where the kernels do not know one."""
    if isinstance(fmt, BlockFormat):
        return _block(fmt, search)
    codec = NativeCodec(rows=1, columns=fmt.block[1], codebook_count=1)
    if isinstance(fmt, HiF4Format):
        codec.family, codec.bits = 3, 4
        offsets = {0, *(o // 2 for o in search.offsets)} if search else {0}
        _set_offsets(codec, tuple(sorted(offsets, key=lambda o: (o < 0, abs(o)))))
        codec.ratios[0] = float(ml_dtypes.bfloat16(1 / 7))
        return codec
    if isinstance(fmt, AffineFormat) and fmt.bits in (4, 8) and _short(fmt.group):
        codec.family = 1 if fmt.offset == "bias" else 2
        codec.bits, codec.levels = fmt.bits, fmt.levels
        return codec if _set_ratios(codec, search.shrink if search else (1.0,)) else None
    return None


def _short(columns: int) -> bool:
    return 16 <= columns <= 128 and columns % 16 == 0


def _block(fmt: BlockFormat, search: SearchLike | None) -> NativeCodec | None:
    rows, columns = fmt.block_shape
    codebooks, scale = fmt.codebooks, fmt.scale
    along_row = rows == 1 and _short(columns)
    large = (fmt.bits == 8 and (rows, columns) in ((1, -1), (-1, -1))) or (
        rows > 1 and columns > 0 and columns % 64 == 0
    )
    if not along_row and not (large and len(codebooks) == 1 and codebooks[0].kind == "e4m3" and codebooks[0].rounding):
        return None
    if rows < 0 and scale.name != "fp32":
        return None
    if scale.name not in _SCALES or len(codebooks) > 4 or sorted(fmt.order) != list(range(len(codebooks))):
        return None
    if len(codebooks) > 1 and (scale.dtype is not np.uint8 or len(codebooks) << scale.bits > 256):
        return None
    codec = NativeCodec(family=0, bits=fmt.bits, rows=rows, columns=columns, codebook_count=len(codebooks))
    codec.scale_kind, codec.scale_bits, codec.scale_low = _SCALES[scale.name], scale.bits, scale.low
    codec.order[: len(codebooks)] = fmt.order
    codec.shared_base = fmt.shared_base
    for i, codebook in enumerate(codebooks):
        described = _codebook(codebook, fmt)
        if described is None:
            return None
        codec.codebooks[i] = described
    if search is None:
        return codec
    codec.metric, codec.rule = _METRICS[search.metric], _RULES[search.rule]
    codec.four_over_six = search.only == "four_over_six"
    codec.single = (search.offsets, search.power_offsets) == ((0,), (0,)) and len(codebooks) == 1
    if search.metric != "sse" and not codec.four_over_six:
        return None
    ratios = search.int_ratios if fmt.bits == 4 else search.float_ratios
    offsets = search.power_offsets if scale.name == "e8m0" else search.offsets
    return codec if _set_ratios(codec, ratios) and _set_offsets(codec, offsets) else None


def _codebook(codebook: Codebook, fmt: BlockFormat) -> NativeCodebook | None:
    kind = _LADDER if codebook.rounding is None else _KINDS.get(codebook.kind)
    if kind is None or (kind == _LADDER and codebook.bits != 4) or codebook.exponent < 1:
        return None
    values = codebook.array
    used = np.delete(values, list(codebook.unused))
    found = NativeCodebook(kind=kind, top=codebook.top, exponent=codebook.exponent)
    found.lowest, found.highest = used.min(), used.max()
    found.limit = np.float32(np.finfo(np.float32).max / np.nanmax(np.abs(values)) * (1 - 2.0**-8))
    found.even_from = 2 - 2.0 ** -(codebook.mantissa_bits + 1)
    found.rceil_from = codebook.top / 2.0**codebook.exponent
    if fmt.scale.ordered:
        found.high = min(fmt.scale.high, int(fmt.scale.to_code(np.array([found.limit], dtype=np.float32))[0]))
    found.zero_code = int(codebook.encode(np.zeros((1, 1), dtype=np.float32))[0, 0])
    found.values[: len(values)] = values.tolist()
    if kind == _LADDER:
        thresholds, codes = codebook.ladder
        padded = [*codes.tolist(), *[int(codes[-1])] * (16 - len(codes))]
        found.thresholds[:] = [*thresholds.tolist(), *[float("inf")] * (16 - len(thresholds))]
        found.ladder_codes[:] = padded
        found.ladder_values[:] = [float(values[c]) for c in padded]
    return found


def _set_offsets(codec: NativeCodec, offsets: tuple[int, ...]) -> bool:
    if not 0 < len(offsets) <= 256:
        return False
    codec.offset_count = len(offsets)
    for i, offset in enumerate(offsets):
        codec.offsets[i] = offset
        codec.above[i] = min(offset, max(offsets[:i], default=-_FAR))
        codec.below[i] = max(offset, min(offsets[:i], default=_FAR))
    return True


def _set_ratios(codec: NativeCodec, ratios: tuple[float, ...]) -> bool:
    if not 0 < len(ratios) <= 64:
        return False
    codec.ratio_count = len(ratios)
    codec.ratios[: len(ratios)] = ratios
    return True
