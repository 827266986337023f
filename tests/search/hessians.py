"""Hessians of correlated inputs, and weights for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfbyte.formats import QuantizedTensor
from halfbyte.search.gptq import gptq
from halfbyte.search.local_hessian import Codes, prepare_local


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


def output_error(weight: ArrayLike, decoded: ArrayLike, hessian: ArrayLike) -> float:
    """Relative output error of a quantized weight: trace(E H E^T) / trace(W H W^T), [..., N, K] and [..., K, K]."""
    w = np.asarray(weight).astype(np.float64)
    e = np.asarray(decoded).astype(np.float64) - w
    h = np.asarray(hessian, dtype=np.float64)
    energy = float(np.sum((w @ h) * w))
    return float(np.sum((e @ h) * e)) / energy if energy else 0.0


def encode_local(
    weight: NDArray[Any], name: str, search: str, hessian: ArrayLike, codes: Codes = "nearest", damping: float = 0.01
) -> QuantizedTensor:
    """Quantize with the blocks along the diagonal of one Hessian, or of one for each expert."""
    each = np.reshape(hessian, (-1, *np.shape(hessian)[-2:]))
    return gptq(weight, name, search, [prepare_local(one, name, codes=codes, damping=damping) for one in each])
