"""The NumPy reference encoder: the definition that every faster backend equals bit for bit.

Order of operations, all in FP32: y = x * (1 / global scale); z = y * (1 / scale); e = z - nearest(z);
error = (sum of w * e * e, element after element) * (r * r) with r = scale / p, where p is the power of two above
the first candidate's scale (exact; it keeps r * r in range for any weight); the first least error wins.
A single candidate is not judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import BlockFormat, Codebook
from halfbyte.search.rules import base_codes
from halfbyte.search.searches import Metric, Search

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
_LANES = 64


def encode_blocks(
    x: Floats, fmt: BlockFormat, search: Search, global_scale: Floats | None, weight: Floats | None
) -> tuple[Codes, NDArray[Any]]:
    """Codes [n, B] (unpacked) and stored scales [n] of blocks x [n, B]; global_scale [n], weight [n, B]."""
    y = x if global_scale is None else x * (np.float32(1) / global_scale)[:, None]
    if search.only == "four_over_six":
        assert global_scale is not None
        found = _four_over_six(x, fmt, search, global_scale, weight)
    else:
        found = _sweep(y, fmt, search, weight)
    codes, scales = found
    zero = ~np.any(x, axis=1)
    codes[zero] = fmt.codebooks[0].encode(np.zeros((1, 1), dtype=np.float32))[0, 0]
    scales[zero] = 0
    return codes, scales


def candidates(
    amax: Floats, codebook: Codebook, fmt: BlockFormat, search: Search
) -> Iterator[tuple[NDArray[Any], Floats]]:
    """Scale codes and values to try for blocks of this (normalised) amax, the absmax scale first."""
    base = base_codes(np.where(amax == 0, np.float32(1), amax), codebook, fmt, search)
    limit = largest_scale(codebook)
    if fmt.scale.ordered:
        high = min(fmt.scale.high, int(fmt.scale.to_code(np.array([limit]))[0]))
        offsets = search.power_offsets if fmt.scale.name == "e8m0" else search.offsets
        for offset in offsets:
            codes = np.clip(base.astype(np.int32) + offset, fmt.scale.low, high).astype(np.uint8)
            yield codes, fmt.scale.to_value(codes)
        return
    exact = np.where(amax == 0, np.float32(1), amax) / np.float32(codebook.top)
    for ratio in search.int_ratios if codebook.bits == 4 else search.float_ratios:
        codes = fmt.scale.to_code(np.minimum(exact * np.float32(ratio), limit))
        yield codes, fmt.scale.to_value(codes)


def largest_scale(codebook: Codebook) -> np.float32:
    """A bound for scales that keeps every value of the table finite in FP32, rounding to BF16 included."""
    return np.float32(np.finfo(np.float32).max / np.nanmax(np.abs(codebook.array)) * (1 - 2.0**-8))


def unit_of(scale: Floats) -> Floats:
    """The power of two that brings each scale into [0.5, 1)."""
    return np.ldexp(np.float32(1), -np.frexp(scale)[1]).astype(np.float32)


def _sweep(y: Floats, fmt: BlockFormat, search: Search, weight: Floats | None) -> tuple[Codes, NDArray[Any]]:
    best = _Best(y.shape, fmt)
    amax = np.abs(y).max(axis=1)
    base_codebook = fmt.codebooks[fmt.order[0]]
    unit: Floats | None = None
    only = (search.offsets, search.power_offsets) == ((0,), (0,)) and len(fmt.codebooks) == 1
    for index in fmt.order:
        codebook = fmt.codebooks[index]
        for stored, scale in candidates(amax, base_codebook if fmt.shared_base else codebook, fmt, search):
            z = y * (np.float32(1) / scale)[:, None]
            codes = codebook.encode(z)
            if only:
                return codes, stored
            unit = unit_of(scale) if unit is None else unit
            relative = scale * unit
            loss = loss_of(z - codebook.array[codes], weight, search.metric)
            best.offer(loss * (relative * relative), codes, stored, index)
    return best.codes, best.scales


def _four_over_six(
    x: Floats, fmt: BlockFormat, search: Search, global_scale: Floats, weight: Floats | None
) -> tuple[Codes, NDArray[Any]]:
    """Four Over Six in the FP32 order of its reference implementation (arXiv 2512.02010, fouroversix)."""
    # a power of two changes no bit of the result; it keeps the squares of huge and tiny weights in range
    unit = unit_of(global_scale)
    x, global_scale = x * unit[:, None], global_scale * unit
    top = np.float32(1536)
    amax = global_scale * top
    encode_scale = top / amax
    decode_scale = np.float32(1) / encode_scale
    best = _Best(x.shape, fmt)
    block_max = np.abs(x).max(axis=1)
    for index in fmt.order:
        codebook = fmt.codebooks[index]
        base = (block_max / np.float32(codebook.top)) * encode_scale
        for factor in (np.float32(1), np.float32(1.5)) if codebook.kind == "e2m1" else (np.float32(1),):
            stored = fmt.scale.to_code(base * factor)
            scale = fmt.scale.to_value(stored)
            codes = codebook.encode(x * (np.float32(1) / (decode_scale * scale))[:, None])
            value = codebook.array[codes] * scale[:, None] * amax[:, None] / top
            best.offer(loss_of(value - x, weight, search.metric), codes, stored, index)
    return best.codes, best.scales


class _Best:
    """The best candidate of each block so far."""

    def __init__(self, shape: tuple[int, ...], fmt: BlockFormat) -> None:
        self.loss: Floats | None = None
        self.codes = np.zeros(shape, dtype=np.uint8)
        self.scales = np.zeros(shape[0], dtype=fmt.scale.dtype)
        self.selector_shift = fmt.scale.bits if len(fmt.codebooks) > 1 else 0

    def offer(self, loss: Floats, codes: Codes, stored: NDArray[Any], codebook: int) -> None:
        if self.selector_shift:
            stored = stored | np.uint8(codebook << self.selector_shift)
        if self.loss is None:
            # the first candidate stands even where its error overflows
            self.loss, self.codes[:], self.scales[:] = loss.copy(), codes, stored
            return
        better = loss < self.loss
        self.loss[better] = loss[better]
        self.codes[better] = codes[better]
        self.scales[better] = stored[better]


def loss_of(error: Floats, weight: Floats | None, metric: Metric) -> Floats:
    """Per block: (weighted) sum of squares, sum of magnitudes, or the largest magnitude."""
    terms = error * error if metric == "sse" else np.abs(error)
    if weight is not None:
        terms = terms * weight
    if metric == "max":
        return np.asarray(terms.max(axis=1))
    if terms.shape[1] > _LANES * 2:
        # large blocks (channels, tiles, tensors): 64 running sums, then their sum
        padded = np.pad(terms, ((0, 0), (0, -terms.shape[1] % _LANES)))
        terms = _running_sum(padded.reshape(len(terms), -1, _LANES).transpose(1, 0, 2))
    return _running_sum(np.ascontiguousarray(terms.T))


def _running_sum(rows: Floats) -> Floats:
    """Sum over the first axis, one after the other: the order that vector code with a block per lane has."""
    total = np.zeros(rows.shape[1:], dtype=np.float32)
    for row in rows:
        total += row
    return total
