"""Hessians of correlated inputs, and weights for them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def inputs(k: int, count: int, seed: int = 0) -> NDArray[np.float64]:
    """``count`` inputs of k channels: of different size, with a few common directions; one seed, one distribution."""
    mixing = np.random.RandomState(seed)
    spread = np.exp(0.5 * mixing.standard_normal(k))
    common = mixing.standard_normal((8, k)) / 2
    r = np.random.RandomState(seed + 1000 + count)
    return np.asarray(r.standard_normal((count, k)) * spread + r.standard_normal((count, 8)) @ common)


def hessian(k: int, count: int = 1024, seed: int = 0) -> NDArray[np.float64]:
    """The sum of x x^T over those inputs."""
    x = inputs(k, count, seed)
    return np.asarray(x.T @ x)


def weight(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Gaussian weights of the usual size."""
    return (np.random.RandomState(seed).standard_normal(shape) * 0.02).astype(np.float32)
