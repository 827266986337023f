"""Errors of blocks in the FP32 order of operations that all backends share."""

from __future__ import annotations

from typing import Literal

import numpy as np

from halfbyte.formats.arrays import Floats

Metric = Literal["sse", "mae", "max"]
SMALLEST = np.float32(2.0**-126)
_LANES = 64


def unit_of(scale: Floats) -> Floats:
    """The power of two that brings each scale into [0.5, 1)."""
    return np.ldexp(np.float32(1), -np.frexp(scale)[1]).astype(np.float32)


def loss_of(error: Floats, weight: Floats | None, metric: Metric) -> Floats:
    """Per block: (weighted) sum of squares, sum of magnitudes, or the largest magnitude; infinite beyond FP32."""
    with np.errstate(over="ignore"):
        return _loss_of(error, weight, metric)


def _loss_of(error: Floats, weight: Floats | None, metric: Metric) -> Floats:
    terms = error * error if metric == "sse" else np.abs(error)
    if weight is not None:
        terms = terms * weight
    if metric == "max":
        return np.asarray(terms.max(axis=1))
    if terms.shape[1] > _LANES * 2:
        # large blocks (channels, tiles, tensors): 64 running sums, then their sum
        padded = np.pad(terms, ((0, 0), (0, -terms.shape[1] % _LANES)))
        terms = _running_sum(padded.reshape(len(terms), -1, _LANES).transpose(1, 0, 2))
    return _running_sum(np.ascontiguousarray(terms.T))


def _running_sum(rows: Floats) -> Floats:
    """Sum over the first axis, one after the other: the order that vector code with a block per lane has."""
    total = np.zeros(rows.shape[1:], dtype=np.float32)
    for row in rows:
        total += row
    return total
