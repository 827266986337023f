"""The NumPy reference of rounding with error feedback: the definition that the compiled code equals bit for bit.

Order of operations, all in FP32. y = x * (1 / global scale). Columns are rounded in the order of the arrays. Before a
block, each of its columns j becomes y_j - d_i * F_ij for all earlier columns i in turn; within the block likewise.
A column's value is nearest(y * (1 / scale)) * scale, its error d = y - value. A candidate's loss is the sum of
(u * u) * gain over the block, u = d * p, where p is the power of two above the first candidate's scale; without
feedback u = (e_j + e_i * V_ij for all i < j in turn) * p with the errors e of nearest rounding. The first least
loss wins; a single candidate is not judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import AffineFormat, BlockFormat, Codebook, QuantizedTensor
from halfbyte.search.affine_search import numbers, solve_range, values
from halfbyte.search.reference import candidates, unit_of
from halfbyte.search.rules import SMALLEST
from halfbyte.search.searches import Search

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class Rounding:
    """The arrays that steer a rounding, over columns in the order in which they are rounded.

    ``inner`` FP32 [K/B, B, B] (row j: coefficients of the errors of the block's columns 0..j-1) and ``outer`` FP32
    [K/16, K, 16] (of all columns, for 16 columns each) are the feedback; None: none. Candidates are judged by
    ``judge`` [K/B, B, B] and ``gain`` [K], with feedback or without. ``block_of`` int32 [K] names the block whose
    given scale a column has (then B is 16 in ``inner`` and nothing is judged); None: scales are chosen.
    """

    gain: Floats
    judge: Floats | None = None
    judge_feedback: bool = False
    inner: Floats | None = None
    outer: Floats | None = None
    block_of: NDArray[np.int32] | None = None


@dataclass
class _Choice:
    """Scales, offsets and tables of one block of every row (a trailing axis may hold candidates)."""

    stored: NDArray[Any]
    scale: Floats
    offset: Floats
    codebook: NDArray[Any]


def round_reference(x: Floats, out: QuantizedTensor, search: Search, how: Rounding, codes: Codes) -> None:
    """Round x [L, N, K] into unpacked ``codes`` [L, N, K] and the scales and offsets of ``out``."""
    fmt = out.format
    lead, n, k = x.shape
    y = x.reshape(-1, k).T.copy()  # [K, rows]
    if out.global_scale is not None:
        y *= np.repeat(np.float32(1) / out.global_scale.reshape(-1), n)[None]
    scales = out.scales.reshape(lead * n, -1)
    offsets = None if out.offsets is None else out.offsets.reshape(lead * n, -1)
    found = codes.reshape(-1, k)
    error = np.zeros_like(y)
    size = fmt.block[1] if how.block_of is None else 16
    for start in range(0, k, size):
        block = start // size
        if how.outer is not None:
            for i in range(start):
                coefficients = how.outer[start // 16 : (start + size) // 16, i].reshape(-1)
                y[start : start + size] -= error[i] * coefficients[:, None]
        if how.block_of is None:
            choice = _choose(y[start : start + size], fmt, search, how, block)
            scales[:, block] = choice.stored
            if offsets is not None:
                offsets[:, block] = choice.offset
        inner = None if how.inner is None else how.inner[block]
        for j in range(start, start + size):
            if how.block_of is not None:
                b = int(how.block_of[j])
                choice = _given(fmt, scales[:, b], None if offsets is None else offsets[:, b])
            v = y[j]
            for i in range(start, j) if inner is not None else ():
                assert inner is not None
                v = v - error[i] * inner[j - start, i - start]
            found[:, j], value = _round(v, fmt, choice)
            error[j] = v - value


def _choose(y: Floats, fmt: Any, search: Search, how: Rounding, block: int) -> _Choice:
    """The scale and table of least loss for blocks y [B, rows]."""
    best: _Choice | None = None
    loss = np.zeros(y.shape[1], dtype=np.float32)
    unit = None
    for choice, judged in _candidates(y, fmt, search):
        if unit is None:
            unit = _unit(y, choice, fmt)
        new_loss = _loss(y, fmt, choice, unit, how, block) if judged else np.zeros_like(loss)
        if best is None:
            best, loss = choice, new_loss
            continue
        better = new_loss < loss
        loss = np.where(better, new_loss, loss)
        for name in ("stored", "scale", "offset", "codebook"):
            setattr(best, name, np.where(better, getattr(choice, name), getattr(best, name)))
    assert best is not None
    if isinstance(fmt, BlockFormat):
        zero = ~np.any(y, axis=0)
        if len(fmt.codebooks) > 1:
            best.stored = best.stored | (best.codebook << np.uint8(fmt.scale.bits))
        best.stored = np.where(zero, np.zeros_like(best.stored), best.stored)
        best.codebook = np.where(zero, np.uint8(0), best.codebook)
        best.scale = np.where(zero, np.float32(0), best.scale)
    return best


def _unit(y: Floats, first: _Choice, fmt: Any) -> Floats:
    if isinstance(fmt, AffineFormat):
        return unit_of(np.maximum(np.abs(y.min(axis=0)), np.abs(y.max(axis=0))) + SMALLEST)
    return unit_of(first.scale)


def _candidates(y: Floats, fmt: Any, search: Search) -> Any:
    """Pairs of a choice and whether there is anything to judge."""
    none = np.zeros(y.shape[1], dtype=np.float32)
    if isinstance(fmt, AffineFormat):
        low, high = y.min(axis=0), y.max(axis=0)
        for shrink_low in search.shrink:
            for shrink_high in search.shrink:
                scale, offset = solve_range(low * np.float32(shrink_low), high * np.float32(shrink_high), fmt)
                yield _Choice(scale.astype(ml_dtypes.bfloat16), scale, offset, none), True
        return
    assert isinstance(fmt, BlockFormat)
    amax = np.abs(y).max(axis=0)
    single = (search.offsets, search.power_offsets) == ((0,), (0,)) and len(fmt.codebooks) == 1
    single = single and search.only != "four_over_six"
    for index in fmt.order:
        base = fmt.codebooks[fmt.order[0]] if fmt.shared_base else fmt.codebooks[index]
        for stored, scale in _scales(amax, base, fmt, search):
            yield _Choice(stored, scale, none, np.full(len(amax), index, dtype=np.uint8)), not single


def _scales(amax: Floats, codebook: Codebook, fmt: BlockFormat, search: Search) -> Any:
    if search.only != "four_over_six":
        yield from candidates(amax, codebook, fmt, search)
        return
    base = np.where(amax == 0, np.float32(1), amax) / np.float32(codebook.top)
    for factor in (1.0, 1.5) if codebook.kind == "e2m1" else (1.0,):
        stored = fmt.scale.to_code(base * np.float32(factor))
        yield stored, fmt.scale.to_value(stored)


def _loss(y: Floats, fmt: Any, choice: _Choice, unit: Floats, how: Rounding, block: int) -> Floats:
    size = len(y)
    coefficients = None if how.judge is None else how.judge[block]
    errors: list[Floats] = []
    total = np.zeros(y.shape[1], dtype=np.float32)
    for j in range(size):
        v = y[j]
        if how.judge_feedback and coefficients is not None:
            for i in range(j):
                v = v - errors[i] * coefficients[j, i]
        v = v - _round(v, fmt, choice)[1]
        errors.append(v)
        if not how.judge_feedback and coefficients is not None:
            for i in range(j):
                v = v + errors[i] * coefficients[j, i]
        u = v * unit
        total = total + u * u * how.gain[block * size + j]
    return total


def _round(v: Floats, fmt: Any, choice: _Choice) -> tuple[Codes, Floats]:
    """Codes and values of one column."""
    if isinstance(fmt, AffineFormat):
        q = numbers(v, choice.scale, choice.offset, fmt)
        return q.astype(np.uint8), values(q, choice.scale, choice.offset, fmt)
    zero = choice.scale == 0
    z = v * (np.float32(1) / np.where(zero, np.float32(1), choice.scale))
    codes = np.zeros(v.shape, dtype=np.uint8)
    found = np.zeros(v.shape, dtype=np.float32)
    for index, codebook in enumerate(fmt.codebooks):
        mine = choice.codebook == index
        if mine.any():
            part = codebook.encode(z[mine])
            codes[mine], found[mine] = part, codebook.array[part]
    codes[zero] = fmt.codebooks[0].encode(np.zeros((1, 1), dtype=np.float32))[0, 0]
    return codes, np.where(zero, np.float32(0), found * choice.scale)


def _given(fmt: Any, stored: NDArray[Any], offset: NDArray[Any] | None) -> _Choice:
    """The choice that stored scales stand for; a stored zero is a block of zeros."""
    none = np.zeros(len(stored), dtype=np.float32)
    if isinstance(fmt, AffineFormat):
        assert offset is not None
        return _Choice(stored, stored.astype(np.float32), offset.astype(np.float32), none)
    scale, codebook = fmt.split_scales(stored)
    zero = (stored & np.uint8((1 << fmt.scale.bits) - 1)) == 0 if stored.dtype == np.uint8 else scale == 0
    chosen = np.zeros(len(stored), dtype=np.uint8) if codebook is None else codebook
    return _Choice(stored, np.where(zero, np.float32(0), scale), none, chosen)
