"""Reference encoder of affine formats: the ends of each group's range are shrunk by every pair of factors."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import AffineFormat
from halfbyte.search.reference import loss_of, unit_of
from halfbyte.search.rules import SMALLEST
from halfbyte.search.searches import Search

Floats = NDArray[np.float32]
_END = np.float32(2.0**127 * (1 - 2.0**-6))  # levels * scale + bias must not overflow in wider groups


def encode_affine(
    x: Floats, fmt: AffineFormat, search: Search, weight: Floats | None
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any]]:
    """Codes [n, B], BF16 scales [n] and offsets [n] of groups x [n, B]."""
    low, high = x.min(axis=1), x.max(axis=1)
    wide = high / 2 - low / 2 > _END
    if wide.any():
        x = np.where(wide[:, None], np.clip(x, -_END, _END), x)
        low, high = x.min(axis=1), x.max(axis=1)
    n = len(x)
    best = np.full(n, np.inf, dtype=np.float32)
    codes = np.zeros(x.shape, dtype=np.uint8)
    scales = np.zeros(n, dtype=ml_dtypes.bfloat16)
    offsets = np.zeros(n, dtype=ml_dtypes.bfloat16 if fmt.offset == "bias" else np.uint8)
    # a power of two changes no bit of the result; it keeps the squares of huge and tiny weights in range
    unit = unit_of(np.maximum(np.abs(low), np.abs(high)) + SMALLEST)[:, None]
    for shrink_low in search.shrink:
        for shrink_high in search.shrink:
            scale, offset = solve_range(low * np.float32(shrink_low), high * np.float32(shrink_high), fmt)
            q = numbers(x, scale[:, None], offset[:, None], fmt)
            loss = loss_of((values(q, scale[:, None], offset[:, None], fmt) - x) * unit, weight, "sse")
            better = loss < best
            best[better], codes[better] = loss[better], q[better]
            scales[better], offsets[better] = scale[better], offset[better]
    return codes, scales, offsets


def solve_range(low: Floats, high: Floats, fmt: AffineFormat) -> tuple[Floats, Floats]:
    """Scale and offset of a range, as the FP32 values of what is stored."""
    if fmt.offset == "zero_point":
        return _zero_point(low, high, fmt)
    # MLX's rule: the end of larger magnitude is met exactly by a whole number of steps
    low, high = np.minimum(low, high), np.maximum(low, high)
    # MLX's own floor is 1e-7, which would wipe out groups of tiny weights
    floor = np.maximum(np.maximum(np.abs(low), np.abs(high)) * np.float32(2.0**-30), SMALLEST)
    step = np.maximum((high - low) / np.float32(fmt.levels), floor)
    downward = np.abs(low) > np.abs(high)
    step = np.where(downward, step, -step)
    edge = np.where(downward, low, high)
    whole = np.rint(edge / step)
    step = np.where(whole != 0, edge / np.where(whole != 0, whole, 1), step)
    offset = np.where(whole != 0, edge, np.float32(0))
    return _as_bf16(step), _as_bf16(offset)


def _zero_point(low: Floats, high: Floats, fmt: AffineFormat) -> tuple[Floats, Floats]:
    """compressed-tensors' asymmetric rule: the range always holds zero, which gets a code of its own."""
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    scale = _as_bf16(np.maximum((high - low) / np.float32(fmt.levels), SMALLEST))
    return scale, np.clip(np.rint(-low / scale), 0, fmt.levels)


def _as_bf16(x: Floats) -> Floats:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def numbers(x: Floats, scale: Floats, offset: Floats, fmt: AffineFormat) -> Floats:
    """The codes of x as numbers."""
    if fmt.offset == "bias":
        return np.clip(np.rint((x - offset) / scale), 0, fmt.levels)
    return np.clip(np.rint(x / scale) + offset, 0, fmt.levels)


def values(q: Floats, scale: Floats, offset: Floats, fmt: AffineFormat) -> Floats:
    """What codes stand for."""
    return q * scale + offset if fmt.offset == "bias" else (q - offset) * scale
