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
    solve = _bias if fmt.offset == "bias" else _zero_point
    n = len(x)
    best = np.full(n, np.inf, dtype=np.float32)
    codes = np.zeros(x.shape, dtype=np.uint8)
    scales = np.zeros(n, dtype=ml_dtypes.bfloat16)
    offsets = np.zeros(n, dtype=ml_dtypes.bfloat16 if fmt.offset == "bias" else np.uint8)
    # a power of two changes no bit of the result; it keeps the squares of huge and tiny weights in range
    unit = unit_of(np.maximum(np.abs(low), np.abs(high)) + SMALLEST)[:, None]
    for shrink_low in search.shrink:
        for shrink_high in search.shrink:
            q, scale, offset, value = solve(x, low * np.float32(shrink_low), high * np.float32(shrink_high), fmt)
            loss = loss_of((value - x) * unit, weight, "sse")
            better = loss < best
            best[better], codes[better] = loss[better], q[better]
            scales[better], offsets[better] = scale[better], offset[better]
    return codes, scales, offsets


def _bias(x: Floats, low: Floats, high: Floats, fmt: AffineFormat) -> tuple[Any, Any, Any, Floats]:
    """MLX's rule: the end of larger magnitude is met exactly by a whole number of steps."""
    low, high = np.minimum(low, high), np.maximum(low, high)
    # MLX's own floor is 1e-7, which would wipe out groups of tiny weights
    floor = np.maximum(np.maximum(np.abs(low), np.abs(high)) * np.float32(2.0**-30), SMALLEST)
    step = np.maximum((high - low) / np.float32(fmt.levels), floor)
    downward = np.abs(low) > np.abs(high)
    step = np.where(downward, step, -step)
    edge = np.where(downward, low, high)
    whole = np.rint(edge / step)
    step = np.where(whole != 0, edge / np.where(whole != 0, whole, 1), step)
    scale = step.astype(ml_dtypes.bfloat16)
    offset = np.where(whole != 0, edge, np.float32(0)).astype(ml_dtypes.bfloat16)
    s, b = scale.astype(np.float32)[:, None], offset.astype(np.float32)[:, None]
    q = np.clip(np.rint((x - b) / s), 0, fmt.levels)
    return q.astype(np.uint8), scale, offset, q * s + b


def _zero_point(x: Floats, low: Floats, high: Floats, fmt: AffineFormat) -> tuple[Any, Any, Any, Floats]:
    """compressed-tensors' asymmetric rule: the range always holds zero, which gets a code of its own."""
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    span = np.maximum((high - low) / np.float32(fmt.levels), SMALLEST)
    scale = span.astype(ml_dtypes.bfloat16)
    s = scale.astype(np.float32)
    offset = np.clip(np.rint(-low / s), 0, fmt.levels)
    q = np.clip(np.rint(x / s[:, None]) + offset[:, None], 0, fmt.levels)
    return q.astype(np.uint8), scale, offset.astype(np.uint8), (q - offset[:, None]) * s[:, None]
