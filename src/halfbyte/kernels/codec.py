"""A format and a search as the native code sees them: one flat structure of numbers."""

from __future__ import annotations

import ctypes
import dataclasses
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from halfbyte.formats import AffineFormat, BlockFormat, Codebook, Format, HiF4Format, ScaleType, scales
from halfbyte.formats.codebooks import (
    E2M1,
    E4M3,
    IF4_INT,
    INT7_SIGN_MAGNITUDE,
    INT7_TWOS_COMPLEMENT,
    INT8_OFFSET,
    e2m1_with,
)
from halfbyte.formats.ggml import INT8
from halfbyte.formats.scale_search import ScaleSearch

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


_PARAMETERS = ("offsets", "power_offsets", "int_ratios", "float_ratios", "shrink", "metric", "rule", "only")
_FIELDS: dict[type, frozenset[str]] = {
    BlockFormat: frozenset(
        ("name", "codebooks", "scale", "block_shape", "has_global_scale", "order", "shared_base", "global_top")
    ),
    AffineFormat: frozenset(("name", "bits", "group", "offset")),
    HiF4Format: frozenset(("name",)),
    Codebook: frozenset(("name", "values", "top", "rounding", "unused", "exponent", "mantissa_bits", "kind")),
    ScaleType: frozenset(("name", "dtype", "bits", "maximum", "to_code", "to_value", "low", "high")),
}
"""Classes that native code knows, each with all the fields that it may have; subclasses are other classes."""
_ROUNDINGS = {c.kind: c for c in (E2M1, INT7_SIGN_MAGNITUDE, INT7_TWOS_COMPLEMENT, IF4_INT, INT8_OFFSET, E4M3, INT8)}


def declare_search(kind: type) -> None:
    """Let native code run searches of exactly this class, as long as it has no fields but the known parameters."""
    _FIELDS[kind] = frozenset((*_PARAMETERS, "name", "description"))


def _is_known(thing: object) -> bool:
    """Whether the class of an object is known and has the fields that native code knows, no more and no fewer."""
    fields = _FIELDS.get(type(thing))
    return fields is not None and {f.name for f in dataclasses.fields(thing)} == fields  # type: ignore[arg-type]


def understands(fmt: Format) -> bool:
    """Whether native code may stand in for a format: it fails closed, and NumPy does what it does not know.

    So does a format, codebook or scale type of another class, with another field, or under a known name with another
    rounding.
    """
    return _is_known(fmt) and _parts_are_known(fmt)


@lru_cache(maxsize=256)
def _parts_are_known(fmt: Format) -> bool:
    if fmt.scale is not None and not (_is_known(fmt.scale) and fmt.scale == scales.BY_NAME.get(fmt.scale.name)):
        return False
    return all(_is_known(codebook) and _rounds_as_its_kind(codebook) for codebook in fmt.codebooks)


def _rounds_as_its_kind(codebook: Codebook) -> bool:
    """Whether a codebook's rounding and values are those that its kind has in native code."""
    if codebook.rounding is None:
        return True
    known = e2m1_with(codebook.values[8]) if codebook.kind == "e2m1_special" else _ROUNDINGS.get(codebook.kind)
    return (
        known is not None
        and all(
            np.array_equal(getattr(codebook, name), getattr(known, name), equal_nan=True)
            for name in ("values", "unused")
        )
        and codebook.rounding is known.rounding
    )


class NativeCodebook(ctypes.Structure):
    """``hb_table`` of the native interface: a codebook."""

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
    """``hb_codec`` of the native interface: a format with a search."""

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
    """``hb_stats`` of the native interface: sums of errors."""

    _fields_ = (
        ("squared_error", c_double),
        ("squares", c_double),
        ("max_error", c_double),
        ("saturated", c_int64),
        ("blocks", c_int64 * 4),
    )


class NativeTask(ctypes.Structure):
    """``hb_task`` of the native interface: one call to encode, decode or compare."""

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
    """``hb_gptq_task`` of the native interface: one call to round with feedback."""

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


class NativeRows(ctypes.Structure):
    """``hb_rows_task`` of the native interface: a group of rows that take each other's errors."""

    _fields_ = (
        ("x", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("judge_feedback", c_int32),
        *((name, c_void_p) for name in ("judge", "gain", "inner", "outer", "block_of", "coupling")),
        *((name, c_void_p) for name in ("codes", "scales", "offsets", "error")),
    )


class NativeDescent(ctypes.Structure):
    """``hb_descent_task`` of the native interface: a group of rows whose codes move."""

    _fields_ = (
        ("n", c_int64),
        ("k", c_int64),
        *((name, c_void_p) for name in ("values", "codes", "scales", "offsets", "places", "gradient")),
        *((name, c_void_p) for name in ("coupling", "hessian", "moved")),
        ("margin", c_float),
        ("limit", c_int64),
        ("moves", c_void_p),
    )


def describe(fmt: Format, search: ScaleSearch | None) -> NativeCodec | None:
    """The structure for a format and a search (None: for decoding), or None where native code does not know one."""
    if not understands(fmt) or not (search is None or _is_known(search)):
        return None
    return _describe(fmt, search)


@lru_cache(maxsize=256)
def _describe(fmt: Format, search: ScaleSearch | None) -> NativeCodec | None:
    return _KINDS_OF_FORMATS[type(fmt)](fmt, search)


def _hif4(fmt: HiF4Format, search: ScaleSearch | None) -> NativeCodec:
    codec = NativeCodec(family=3, bits=4, rows=1, columns=64, codebook_count=1)
    offsets = {0, *(o // 2 for o in search.offsets)} if search else {0}
    _set_offsets(codec, tuple(sorted(offsets, key=lambda o: (o < 0, abs(o)))))
    codec.ratios[0] = float(ml_dtypes.bfloat16(1 / 7))
    return codec


def _affine(fmt: AffineFormat, search: ScaleSearch | None) -> NativeCodec | None:
    if fmt.bits not in (4, 8) or not _short(fmt.group):
        return None
    codec = NativeCodec(rows=1, columns=fmt.group, codebook_count=1, bits=fmt.bits, levels=fmt.levels)
    codec.family = 1 if fmt.offset == "bias" else 2
    return codec if _set_ratios(codec, search.shrink if search else (1.0,)) else None


def _short(columns: int) -> bool:
    return 16 <= columns <= 128 and columns % 16 == 0


def _block(fmt: BlockFormat, search: ScaleSearch | None) -> NativeCodec | None:
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
    native = NativeCodebook(kind=kind, top=codebook.top, exponent=codebook.exponent)
    native.lowest, native.highest = used.min(), used.max()
    native.limit = np.float32(np.finfo(np.float32).max / np.nanmax(np.abs(values)) * (1 - 2.0**-8))
    native.even_from = 2 - 2.0 ** -(codebook.mantissa_bits + 1)
    native.rceil_from = codebook.top / 2.0**codebook.exponent
    if fmt.scale.ordered:
        native.high = min(fmt.scale.high, int(fmt.scale.to_code(np.array([native.limit], dtype=np.float32))[0]))
    native.zero_code = int(codebook.encode(np.zeros((1, 1), dtype=np.float32))[0, 0])
    native.values[: len(values)] = values.tolist()
    if kind == _LADDER:
        thresholds, codes = codebook.ladder
        padded = [*codes.tolist(), *[int(codes[-1])] * (16 - len(codes))]
        native.thresholds[:] = [*thresholds.tolist(), *[float("inf")] * (16 - len(thresholds))]
        native.ladder_codes[:] = padded
        native.ladder_values[:] = [float(values[c]) for c in padded]
    return native


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


_KINDS_OF_FORMATS: dict[type, Any] = {BlockFormat: _block, AffineFormat: _affine, HiF4Format: _hif4}
