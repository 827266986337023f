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
from halfbyte.formats.arrays import Codes, Floats
from halfbyte.formats.losses import loss_of, unit_of
from halfbyte.formats.scale_search import ScaleSearch
from halfbyte.search.rules import base_codes


def encode_blocks(
    x: Floats, fmt: BlockFormat, search: ScaleSearch, global_scale: Floats | None, weight: Floats | None
) -> tuple[Codes, NDArray[Any]]:
    """Codes [n, B] (unpacked) and stored scales [n] of blocks x [n, B]; global_scale [n], weight [n, B]."""
    y = x if global_scale is None else x * (np.float32(1) / global_scale)[:, None]
    if search.only == "four_over_six":
        assert global_scale is not None
        codes, scales = _four_over_six(x, fmt, search, global_scale, weight)
    else:
        codes, scales = _sweep(y, fmt, search, weight)
    zero = ~np.any(x, axis=1)
    codes[zero] = fmt.codebooks[0].encode(np.zeros((1, 1), dtype=np.float32))[0, 0]
    scales[zero] = 0
    return codes, scales


def candidates(
    amax: Floats, codebook: Codebook, fmt: BlockFormat, search: ScaleSearch
) -> Iterator[tuple[NDArray[Any], Floats]]:
    """Scale codes and values to try for blocks of this (normalised) amax, the absmax scale first."""
    base = base_codes(np.where(amax == 0, np.float32(1), amax), codebook, fmt, search.rule)
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


def column_candidates(
    amax: Floats, codebook: Codebook, fmt: BlockFormat, search: ScaleSearch
) -> Iterator[tuple[NDArray[Any], Floats]]:
    """The candidates of GPTQ, in whose order of operations Four Over Six is two scales for E2M1 and one otherwise."""
    if search.only != "four_over_six":
        yield from search.candidates(amax, codebook, fmt)
        return
    base = np.where(amax == 0, np.float32(1), amax) / np.float32(codebook.top)
    for factor in (1.0, 1.5) if codebook.kind == "e2m1" else (1.0,):
        stored = fmt.scale.to_code(base * np.float32(factor))
        yield stored, fmt.scale.to_value(stored)


def largest_scale(codebook: Codebook) -> np.float32:
    """A bound for scales that keeps every value of the codebook finite in FP32, rounding to BF16 included."""
    return np.float32(np.finfo(np.float32).max / np.nanmax(np.abs(codebook.array)) * (1 - 2.0**-8))


def _sweep(y: Floats, fmt: BlockFormat, search: ScaleSearch, weight: Floats | None) -> tuple[Codes, NDArray[Any]]:
    best = _Best(y.shape, fmt)
    amax = np.abs(y).max(axis=1)
    base_codebook = fmt.codebooks[fmt.order[0]]
    unit: Floats | None = None
    single = search.single(fmt)
    for index in fmt.order:
        codebook = fmt.codebooks[index]
        for stored, scale in search.candidates(amax, base_codebook if fmt.shared_base else codebook, fmt):
            z = y * (np.float32(1) / scale)[:, None]
            codes = codebook.encode(z)
            if single:
                return codes, stored
            unit = unit_of(scale) if unit is None else unit
            relative = scale * unit
            loss = loss_of(z - codebook.array[codes], weight, search.metric)
            best.offer(loss * (relative * relative), codes, stored, index)
    return best.codes, best.scales


def _four_over_six(
    x: Floats, fmt: BlockFormat, search: ScaleSearch, global_scale: Floats, weight: Floats | None
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
