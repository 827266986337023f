"""SOAR's alternation: block scales and global scale fitted in turn (arXiv 2605.12245).

For given codes and block scales the best global scale has a closed form, a projection; for a given global scale the
search finds codes and block scales. The paper's block step, least squares and rounding with a search scale apart
from the stored one, is replaced by the search itself: for a stored scale nearest rounding is already the best, so
a sweep over stored scales contains it.

``Fit`` and ``row_sums`` are the alternation for weights that come in parts, as in a conversion; sums of rows do not
depend on how many rows are at hand, and neither does their exact sum on the parts or their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfbyte import kernels
from halfbyte.errors import FormatError
from halfbyte.formats import Format, get_format
from halfbyte.formats.arrays import Doubles
from halfbyte.formats.losses import SMALLEST
from halfbyte.search.encode import as_weight, encode, relative_importance
from halfbyte.search.encode_options import EncodeOptions
from halfbyte.search.searches import get_search
from halfbyte.search.searches import global_scale as absmax_scale

ITERATIONS, TOLERANCE = 15, 1e-3
# elements that are compared at a time, few enough for their FP64 copies to stay in a core's cache
_CHUNK = 1 << 16
# what a chunk takes: codes and scales, decoded values, and these, the weights and products in FP64
_CHUNK_BYTES = 64


@dataclass(frozen=True)
class Alternation:
    """``global_scale`` FP32 [...] of least error, and the least (weighted) squared error until after each step, the
    first by the amax rule. Experts that have settled wait for the others."""

    global_scale: NDArray[np.float32]
    errors: list[float]


class Fit:
    """The alternation for one global scale: ``step`` wants the sums at ``scale``, until it is ``done``.

    ``best`` is the scale of least error so far, ``errors`` holds the error of each step.
    """

    def __init__(self, first: float | np.floating[Any], iterations: int = ITERATIONS, tolerance: float = TOLERANCE):
        self.scale = self.best = np.float32(first)
        self.errors: list[float] = []
        self.done = False
        self._iterations, self._tolerance = iterations, tolerance

    def step(self, sums: Iterable[Doubles]) -> None:
        """Move the scale to where it fits the codes best; ``sums``: what ``row_sums`` found, in any order."""
        parts = list(sums)
        error, cross, squares = (math.fsum(x for part in parts for x in part[:, i].tolist()) for i in range(3))
        if not self.errors or error < min(self.errors):
            self.best = self.scale
        self.errors.append(error)
        ratio = cross / squares if cross > 0 and squares > 0 else 1.0
        fitted = np.maximum(np.float32(float(self.scale) * ratio), SMALLEST)
        change = abs(float(fitted) / float(self.scale) - 1)
        self.done = len(self.errors) > self._iterations or change < self._tolerance or self._settled()
        self.scale = fitted

    def _settled(self) -> bool:
        return len(self.errors) > 1 and abs(self.errors[-2] - self.errors[-1]) <= self._tolerance * self.errors[-2]


def soar_global_scale(
    weights: Sequence[ArrayLike],
    format: str | Format,
    search: str = "sweep",
    importance: ArrayLike | None = None,
    *,
    global_scale_inv: bool = False,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
) -> Alternation:
    """The global scale of weights [..., N, K] that share one, by at most ``iterations`` steps.

    Leading indices (experts) have a scale each, fitted on its own. Stops where the scale or the error changes by
    less than ``tolerance`` relatively. ``importance`` as in ``encode``, the largest of each expert counting as 1.
    ``global_scale_inv``: the reciprocals are what is stored, so errors are those that they lead to. ``encode`` with the
    result gives the tensors. FormatError for formats without global scales.
    """
    fmt = get_format(format)
    problem = unfittable(fmt)
    if problem:
        raise FormatError(f"{problem}; use the search alone")
    arrays = [as_weight(w, fmt) for w in weights]
    if not arrays or any(a.shape[:-2] != arrays[0].shape[:-2] for a in arrays):
        raise FormatError("weights that share a global scale must be given together, with the same leading shape")
    relative_importance(importance, arrays[0].shape)  # refuses what does not fit
    lead, columns = arrays[0].shape[:-2], arrays[0].shape[-1]
    amax = np.max([kernels.amax(a)[0] for a in arrays], axis=0)
    first = absmax_scale(amax, fmt, get_search(search, fmt)).reshape(-1)
    matrices = [a.reshape((-1, *a.shape[-2:]) if a.ndim > 1 else (1, 1, -1)) for a in arrays]
    each = None if importance is None else np.broadcast_to(importance, (*lead, columns)).reshape(-1, columns)
    fits = [Fit(scale, iterations, tolerance) for scale in first]
    for i, fit in enumerate(fits):
        weight = None if each is None else each[i]
        while not fit.done:
            fit.step([row_sums(m[i], fmt, search, fit.scale, weight, global_scale_inv) for m in matrices])
    steps = max((len(fit.errors) for fit in fits), default=0)
    errors = [math.fsum(min(fit.errors[: n + 1]) for fit in fits) for n in range(steps)]
    return Alternation(np.array([fit.best for fit in fits], dtype=np.float32).reshape(lead), errors)


def row_sums(
    rows: NDArray[Any],
    fmt: Format,
    search: str,
    scale: np.float32,
    importance: ArrayLike | None = None,
    global_scale_inv: bool = False,
) -> Doubles:
    """What ``Fit.step`` needs to know of rows [N, K] encoded with a global scale, [N, 3].

    The columns are the squared error, the product with the decoded values, and the squares of these, each element
    times its ``importance`` [K]. Rows do not depend on each other.
    """
    weights = relative_importance(importance, rows.shape)
    columns = 1.0 if weights is None else weights.astype(np.float64)
    inverse = np.float32(1) / scale
    options = EncodeOptions(global_scale_inv=inverse) if global_scale_inv else EncodeOptions(global_scale=scale)
    sums = np.empty((len(rows), 3))
    step = max(1, _CHUNK // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        part, chunk = rows[start : start + step], sums[start : start + step]
        decoded = encode(part, fmt, search, importance, options=options).decode().astype(np.float64)
        wide = part.astype(np.float64)
        weighted = decoded * columns
        chunk[:, 1] = (weighted * wide).sum(axis=-1)
        chunk[:, 2] = (weighted * decoded).sum(axis=-1)
        chunk[:, 0] = (np.square(decoded - wide) * columns).sum(axis=-1)
    return sums


def unfittable(fmt: Format) -> str | None:
    """Why a format has nothing to fit, or None."""
    return None if fmt.has_global_scale else f"{fmt.name} has no global scale to fit"


def working_bytes(columns: int) -> int:
    """Memory that ``row_sums`` takes beside its rows of this length."""
    return _CHUNK_BYTES * max(_CHUNK, columns)
