"""The objective of rounding, computed directly."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def weighted_error(error: ArrayLike, hessian: ArrayLike, output_hessian: ArrayLike | None = None) -> float:
    """tr(H_O E H Eᵀ) in FP64 of an error E [N, K]; without ``output_hessian`` tr(E H Eᵀ)."""
    e = np.asarray(error, dtype=np.float64)
    columns = e @ np.asarray(hessian, dtype=np.float64)
    rows = columns if output_hessian is None else np.asarray(output_hessian, dtype=np.float64) @ columns
    return float(np.sum(rows * e))
