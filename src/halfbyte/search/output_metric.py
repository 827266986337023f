"""The metric of a layer's outputs, factored for rounding with row feedback.

With the gradients g of the model's loss at the outputs of a layer, an error E of its weight [N, K] costs about
tr(H_O E H Eᵀ) / 2: H [K, K] the mean of x xᵀ over the inputs, H_O [N, N] the mean of g gᵀ (Tseng et al.,
YAQA, arXiv 2505.22988). GPTQ sees H alone, as if H_O were the identity. H_O is damped to A = H_O / mean(diagonal) +
damping I; with F A Fᵀ a diagonal f, F unit upper triangular, the cost is exactly the sum of f_i d_i H d_iᵀ over rows,
where d_i is the error of row i after the errors of earlier rows were taken from it: t_i = w_i - sum over j < i of
F_ji d_j. So rows are rounded one after the other, as GPTQ rounds columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfbyte.formats.arrays import Doubles, Floats
from halfbyte.search.hessian import checked, damped, factor

DAMPING = 0.1
"""Added to the diagonal of an output Hessian, relative to its mean: gradients of a few thousand tokens are noisy."""


@dataclass(frozen=True)
class PreparedOutput:
    """An output Hessian, made ready for weights with these outputs.

    ``rows`` int64 [N]: the order in which rows are rounded, by falling diagonal. In that order, ``feedback`` FP32
    [N, N] is F, unit upper triangular, and ``metric`` FP32 [N, N] is A, None where ``refine`` did not ask for it.
    ``damping`` is the one that the factorization needed.
    """

    rows: NDArray[np.int64]
    feedback: Floats
    metric: Floats | None
    damping: float


def prepare_output(hessian: ArrayLike, *, damping: float = DAMPING, refine: bool = False) -> PreparedOutput:
    """Factor the mean or sum of g gᵀ [N, N] over the gradients at a weight's outputs.

    FormatError for what cannot be such a matrix. Zeros, where no gradient was seen, become the identity.
    """
    h = checked(hessian, np.shape(hessian)[-1] if np.ndim(hessian) else 0)
    rows = np.argsort(-np.diagonal(h), kind="stable")
    h = np.ascontiguousarray(h[np.ix_(rows, rows)])
    factors = _factored(h, damping)
    metric = damped(h, factors[1]).astype(np.float32) if refine else None
    return PreparedOutput(rows, factors[0], metric, factors[1])


def _factored(hessian: Doubles, damping: float) -> tuple[Floats, float]:
    """Feedback, and the damping that was needed; padded to whole groups of eight rows, as the kernels want it."""
    n = len(hessian)
    padded = np.zeros((n + -n % 8, n + -n % 8))
    padded[:n, :n] = hessian
    if n % 8:
        # padding is worth as much as the mean row and touches no other
        np.fill_diagonal(padded[n:, n:], np.trace(hessian) / n)
    factors = factor(padded, damping)
    return np.ascontiguousarray(factors.feedback[:n, :n], dtype=np.float32), factors.damping
