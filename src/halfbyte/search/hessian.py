"""Hessians of a layer's output error, factored for rounding with error feedback.

With inputs x of a layer, an error e of a row of its weight costs e H e^T, H the mean of x x^T. GPTQ (Frantar et al.,
arXiv 2210.17323) rounds column after column, each error d taken out of the columns that follow by coefficients F:
y_j = w_j - sum over i < j of d_i F_ij. Then e = d F exactly, and F, unit upper triangular, is the one for which
F H F^T is a diagonal, the gain g. So the cost of the row is sum g_j d_j^2, which is what GPTQ minimises term by term.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from halfbyte import kernels
from halfbyte.errors import FormatError
from halfbyte.formats.arrays import Doubles

_RETRIES = 3  # each with ten times the damping


@dataclass(frozen=True)
class Factors:
    """``feedback`` F FP64 [..., K, K], unit upper triangular, and ``gain`` g FP64 [..., K]; its mean input is 1.

    ``unfold`` is the inverse of F: with e = d F the errors d are e times it. ``damping`` is the one that was needed.
    """

    feedback: Doubles
    unfold: Doubles
    gain: Doubles
    damping: float


def checked(hessian: ArrayLike, columns: int) -> Doubles:
    """A Hessian [..., K, K] in FP64, exactly symmetric; FormatError where it cannot be one."""
    h = np.asarray(hessian, dtype=np.float64)
    if h.ndim < 2 or h.shape[-2:] != (columns, columns):
        raise FormatError(f"the Hessian has shape {list(h.shape)}, but {columns} columns need [{columns}, {columns}]")
    if not np.isfinite(h).all():
        raise FormatError("the Hessian holds a NaN or infinity; calibrate again, in FP32, on text without overflows")
    diagonal = np.diagonal(h, axis1=-2, axis2=-1)
    if (diagonal < 0).any():
        raise FormatError("the Hessian has a negative diagonal, so it is no sum of squares; calibrate again")
    largest = diagonal.max(initial=0)
    flipped = np.swapaxes(h, -1, -2)
    if not np.allclose(h, flipped, rtol=0, atol=1e-3 * largest):
        raise FormatError("the Hessian is not symmetric; it must be the sum of x x^T over the inputs x")
    return np.asarray((h + flipped) / 2)


def damped(hessian: Doubles, damping: float) -> Doubles:
    """Hessians [..., K, K] over the mean of their diagonal, ``damping`` added to it; a Hessian of zeros becomes 1.

    Columns that no input reached keep the damping alone, so they are rounded to nearest and count little.
    """
    mean = np.trace(hessian, axis1=-2, axis2=-1)[..., None, None] / hessian.shape[-1]
    result = np.divide(hessian, np.where(mean > 0, mean, 1), order="C")
    diagonal = np.einsum("...ii->...i", result)  # a view
    diagonal += np.where(mean[..., 0] > 0, damping, 1)
    diagonal[diagonal <= 0] = 1
    return np.asarray(result)


def factor(hessian: Doubles, damping: float) -> Factors:
    """Factors of Hessians [..., K, K] as ``checked`` returns them.

    ``damping`` is relative to the mean of the diagonal (0.01 is usual). Where the Hessian is not positive
    definite even so, which rounding can do to Hessians of few tokens, it is multiplied by ten up to three times.
    """
    if not 0 <= damping < 1:
        raise FormatError(f"damping is {damping}, but must lie between 0 and 1, relative to the mean of the diagonal")
    for step in range(_RETRIES + 1):
        now = max(damping, 1e-6 if step else 0.0) * 10**step
        # H = R R^T with R upper triangular: the Cholesky factor of H with rows and columns in reverse order
        reverse = damped(hessian[..., ::-1, ::-1], now)
        inverse, gain = np.empty_like(reverse), np.empty(reverse.shape[:-1])
        if _cholesky(reverse, inverse, gain):
            unfold = np.swapaxes(reverse, -1, -2)[..., ::-1, ::-1]
            return Factors(inverse[..., ::-1, ::-1], unfold, gain[..., ::-1], now)
    raise FormatError(
        f"the Hessian is not positive definite with a damping of {damping}, nor with {_RETRIES} tenfold ones; "
        "calibrate with more tokens or give a larger damping"
    )


def _cholesky(matrices: Doubles, inverse: Doubles, gain: Doubles) -> bool:
    """``halfbyte.kernels.factor_into``, by NumPy where there are no kernels."""
    size = matrices.shape[-1]
    flat = [a.reshape(-1, *a.shape[matrices.ndim - 2 :]) for a in (matrices, inverse, gain)]
    definite = kernels.factor_into(*flat)
    if definite is not None:
        return definite
    return all(factor_reference(*(a[i] for a in flat)) for i in range(len(flat[0]))) if size else True


def factor_reference(m: Doubles, inverse: Doubles, gain: Doubles) -> bool:
    """One matrix [K, K], in the order of operations that makes every machine's bits the same: rank after rank."""
    size = len(m)
    for k in range(size):
        pivot = m[k, k]
        if not 0 < pivot < np.inf:
            return False
        m[k, k:] /= np.sqrt(pivot)
        m[k + 1 :, k + 1 :] -= np.multiply.outer(m[k, k + 1 :], m[k, k + 1 :])
    gain[:] = np.square(np.diagonal(m))
    m[:] = np.triu(m / np.diagonal(m)[:, None].copy())
    inverse[:] = np.eye(size)
    for k in range(size):
        inverse[k + 1 :, : k + 1] -= np.multiply.outer(m[k, k + 1 :], inverse[k, : k + 1])
    return True


def diagonal_blocks(matrix: Doubles, size: int) -> Doubles:
    """The blocks [..., K/size, size, size] along the diagonal of matrices [..., K, K]."""
    lead, count = matrix.shape[:-2], matrix.shape[-1] // size
    tiled = matrix.reshape(*lead, count, size, count, size)
    return np.moveaxis(np.diagonal(tiled, axis1=-4, axis2=-2), -1, -3)
