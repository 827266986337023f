"""SOAR's alternation: block scales and tensor scale fitted in turn (arXiv 2605.12245).

For given codes and block scales the best tensor scale has a closed form, a projection; for a given tensor scale the
search finds codes and block scales. The paper's block step, least squares and rounding with a search scale apart
from the stored one, is replaced by the search itself: for a stored scale nearest rounding is already the best, so
a sweep over stored scales contains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfbyte import kernels
from halfbyte.errors import FormatError
from halfbyte.formats import BlockFormat, Format, get_format
from halfbyte.search.encode import as_weight, encode
from halfbyte.search.rules import tensor_scale as absmax_scale
from halfbyte.search.searches import get_search

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Alternation:
    """``tensor_scale`` FP32 [...] of least error, and the (weighted) squared error after each step, the first by
    the amax rule."""

    tensor_scale: NDArray[np.float32]
    errors: list[float]


def soar_tensor_scale(
    weights: Sequence[ArrayLike],
    format: str | Format,
    search: str = "sweep",
    importance: ArrayLike | None = None,
    *,
    iterations: int = 15,
    tolerance: float = 1e-3,
) -> Alternation:
    """The tensor scale of weights [..., N, K] that share one, by at most ``iterations`` steps.

    Leading indices (experts) have a scale each. Stops where the scale or the error changes by less than
    ``tolerance`` relatively. ``encode`` with the result gives the tensors. FormatError for formats without tensor
    scales.
    """
    fmt = get_format(format)
    if not isinstance(fmt, BlockFormat) or not fmt.has_tensor_scale:
        raise FormatError(f"{fmt.name} has no tensor scale to fit; use the search alone")
    arrays = [as_weight(w, fmt) for w in weights]
    if not arrays or any(a.shape[:-2] != arrays[0].shape[:-2] for a in arrays):
        raise FormatError("weights that share a tensor scale must be given together, with the same leading shape")
    amax = np.max([kernels.amax(a)[0] for a in arrays], axis=0)
    scale = absmax_scale(amax, fmt, get_search(search, fmt))
    best = scale
    errors: list[float] = []
    for _ in range(iterations + 1):
        error, fitted = _step(arrays, fmt, search, importance, scale)
        if not errors or error < min(errors):
            best = scale
        errors.append(error)
        if np.abs(fitted / scale - 1).max() < tolerance or (len(errors) > 1 and _settled(errors, tolerance)):
            break
        scale = fitted
    return Alternation(best, errors)


def _settled(errors: list[float], tolerance: float) -> bool:
    return abs(errors[-2] - errors[-1]) <= tolerance * errors[-2]


def _step(
    arrays: Sequence[NDArray[np.float32]],
    fmt: BlockFormat,
    search: str,
    importance: ArrayLike | None,
    scale: NDArray[np.float32],
) -> tuple[float, NDArray[np.float32]]:
    """Error at a tensor scale, and the tensor scale that fits its codes and block scales best."""
    error = 0.0
    cross: Doubles = np.zeros(scale.shape)
    squares: Doubles = np.zeros(scale.shape)
    weight = None if importance is None else np.asarray(importance, dtype=np.float64)
    for array in arrays:
        decoded = encode(array, fmt, search, importance, tensor_scale=scale).decode().astype(np.float64)
        wide = array.astype(np.float64)
        columns = 1.0 if weight is None else weight if weight.ndim == 1 else weight[..., None, :]
        error += float((np.square(decoded - wide) * columns).sum())
        cross += (wide * decoded * columns).sum(axis=(-2, -1))
        squares += (np.square(decoded) * columns).sum(axis=(-2, -1))
    ratio = np.divide(cross, squares, out=np.ones_like(cross), where=(squares > 0) & (cross > 0))
    return error, (scale * ratio).astype(np.float32)
