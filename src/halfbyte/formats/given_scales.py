"""Rounding to scales that are given: the nearest codes of new values, and the values that keep a code.

Training moves weights while their scales stay. ``Format.round_to`` and ``Format.cells`` answer by these functions,
which NumPy defines and compiled code equals bit for bit.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np

from halfbyte.formats.arrays import Array, Codes, Floats
from halfbyte.formats.codebooks import Codebook

_FAR = np.float32(2.0**13)


def inverse_of(scale: Floats) -> Floats:
    """1 / scale in FP32 as encoders have it, and zero where a scale is zero."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(np.where(scale == 0, np.float32(0), np.float32(1) / scale))


def scaled(x: Array, *inverses: Floats) -> Floats:
    """x times inverses of scales, one after the other as encoders multiply; at most 2**13 from zero, no minus zero."""
    z = x.astype(np.float32, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        for inverse in inverses:
            z = z * inverse
    # a codebook with values of two kinds compares distances, which are all alike far away
    return np.asarray(np.clip(np.nan_to_num(z, nan=0.0), -_FAR, _FAR) + np.float32(0))


@lru_cache(maxsize=64)
def thresholds(codebook: Codebook) -> tuple[Floats, Codes]:
    """Thresholds t [15] and codes c [16] of a codebook of 16: z, no minus zero, has the code c[#(t <= z)].

    Found by bisection over the FP32 numbers, so that they are those of the codebook's own rounding; a level that is
    never chosen has the threshold infinity.
    """
    grid = np.sort(np.unique(codebook.array[[c for c in range(16) if c not in codebook.unused]]))
    points = np.concatenate([[-_FAR], grid, [_FAR]]).astype(np.float32)
    ends: list[np.float32] = []
    codes = [int(codebook.encode(np.array([-_FAR], dtype=np.float32))[0])]
    for low, high in itertools.pairwise(points):
        while int(codebook.encode(np.array([high + 0.0], dtype=np.float32))[0]) != codes[-1]:
            edge = _first_other(codebook, low, high, codes[-1])
            ends.append(edge)
            codes.append(int(codebook.encode(np.array([edge], dtype=np.float32))[0]))
            low = edge
    pad = 16 - len(codes)
    return (
        np.array(ends + [np.float32(np.inf)] * pad, dtype=np.float32)[:15],
        np.array(codes + [codes[-1]] * pad, dtype=np.uint8),
    )


def _first_other(codebook: Codebook, low: np.float32, high: np.float32, code: int) -> np.float32:
    """The smallest number above ``low`` whose code is another one; ``high`` has another one."""
    first, last = _ordinal(low), _ordinal(high)
    while last - first > 1:
        middle = (first + last) // 2
        if int(codebook.encode(np.array([_number(middle)], dtype=np.float32))[0]) == code:
            first = middle
        else:
            last = middle
    return _number(last)


def _ordinal(value: np.float32) -> int:
    """The place of a number among all FP32 numbers; both zeros have the same."""
    bits = int(np.float32(value).view(np.uint32))
    return bits if bits < 0x80000000 else 0x80000000 - bits


def _number(place: int) -> np.float32:
    bits = place if place >= 0 else 0x80000000 - place
    return np.asarray(bits, dtype=np.uint32).view(np.float32)[()] + np.float32(0)


@lru_cache(maxsize=64)
def edges(codebook: Codebook) -> tuple[Floats, Floats]:
    """For each code the middles between its value and both neighbours; at the ends the value itself.

    A code that is never written has no room at all.
    """
    used = sorted({codebook.values[c] + 0.0 for c in range(len(codebook.values)) if c not in codebook.unused})
    grid = np.array(used, dtype=np.float32)
    middles = (grid[:-1] + grid[1:]) / np.float32(2)
    low, high = np.concatenate([grid[:1], middles]), np.concatenate([middles, grid[-1:]])
    array = np.nan_to_num(codebook.array + np.float32(0))
    place = np.searchsorted(grid, array).clip(max=len(grid) - 1)
    known = grid[place] == array
    return np.where(known, low[place], array), np.where(known, high[place], array)
