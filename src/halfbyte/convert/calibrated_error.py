"""The error that a calibrated conversion makes small: that of a weight's outputs on the calibration text.

With the mean H of x xᵀ over the inputs x, an error E of a weight W costs tr(E H Eᵀ), of outputs that have the energy
tr(W H Wᵀ). Where only importance weighs errors, H is its diagonal. Of matrices with many rows some are looked at,
evenly spaced, in FP64, so that the numbers do not depend on how a weight is cut into slices.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from halfbyte.calibration import Calibration
from halfbyte.calibration.importance import Floats
from halfbyte.calibration.token_counts import enough
from halfbyte.convert.encode_slice import Array, Context, columns_of
from halfbyte.formats import QuantizedTensor
from halfbyte.formats.arrays import Doubles
from halfbyte.plan.resources import WEIGHED_BYTES
from halfbyte.plan.shards import Item

ROWS = 1024
"""The most rows of a matrix, or of an expert, that are looked at."""


def count_calibrated_error(
    context: Context, item: Item, first: int, stop: int, array: Array, tensor: QuantizedTensor
) -> tuple[float, float]:
    """Return the squared error and the squares of a slice, weighted by activations; zeros where nothing weighs it.

    ``array`` is the slice [..., N, K] as it was encoded to ``tensor``: smoothed, and in rotated space if its format
    is. Experts that too few tokens reached for a Hessian are left out where others have one.
    """
    use = context.plan.calibration_use
    if use is None or not item.calibrated or item.format is None:
        return 0.0, 0.0
    weight, calibration = item.weight, use.calibration
    scale = columns_of(context, item)
    reached = enough(calibration, weight.name) if item.method else None
    values = item.format.to_plain(tensor).decode()
    stack = len(weight.shape) > 2
    height = weight.shape[-2]
    stride = -(-height // ROWS)
    error = squares = 0.0
    for index in range(stop - first) if stack else [0]:
        expert = first + index if stack else None
        if reached is not None and not reached[expert if expert is not None and len(reached) > 1 else 0]:
            continue
        scale_here = scale if scale is None or scale.ndim == 1 or expert is None else scale[expert]
        cut = slice(None, None, stride) if stack else slice(-first % stride, None, stride)
        dense, decoded = (a[index] if stack else a for a in (array, values))
        for before, after in _pieces(dense[cut], decoded[cut]):
            both = item.format.unrotate(np.stack([after - before, before]), _steps(tensor, index if stack else None))
            if scale_here is not None:
                both /= scale_here
            weigher = _by_hessian if item.method else _by_importance
            energies = weigher(both, calibration, weight.name, expert)
            error, squares = error + stride * energies[0], squares + stride * energies[1]
    return error, squares


def _pieces(dense: Array, decoded: Array) -> Iterator[tuple[Doubles, Doubles]]:
    """Some rows at a time, in FP64."""
    step = max(1, WEIGHED_BYTES // (4 * 8 * dense.shape[-1]))
    for i in range(0, len(dense), step):
        yield dense[i : i + step].astype(np.float64), decoded[i : i + step].astype(np.float64)


def _steps(tensor: QuantizedTensor, expert: int | None) -> NDArray[np.uint8] | None:
    return tensor.rotation if expert is None or tensor.rotation is None else tensor.rotation[expert]


def _by_hessian(both: Doubles, calibration: Calibration, name: str, expert: int | None) -> tuple[float, float]:
    """Energies x H xᵀ of rows [2, N, K], summed over N; H is symmetric, so half of it is enough."""
    assert calibration.statistics is not None
    sums, tokens = calibration.statistics.hessian_sum(name, expert)
    rows = both.reshape(-1, both.shape[-1])
    energies = np.zeros(len(rows))
    step = max(16, WEIGHED_BYTES // (4 * 8 * len(sums)))
    for a in range(0, len(sums), step):
        products = rows[:, a : a + step] @ np.asarray(sums[a : a + step, a:], np.float64)
        width = min(step, len(sums) - a)
        energies += np.einsum("ij,ij->i", products[:, :width], rows[:, a : a + width])
        energies += 2 * np.einsum("ij,ij->i", products[:, width:], rows[:, a + width :])
    error, squares = energies.reshape(2, -1).sum(axis=1) / max(tokens, 1)
    return max(float(error), 0.0), max(float(squares), 0.0)


def _by_importance(both: Doubles, calibration: Calibration, name: str, expert: int | None) -> tuple[float, float]:
    """The same where H is a diagonal."""
    values: Floats = calibration.matched.values[name]
    importance = values[expert] if values.ndim > 1 and expert is not None else values
    error, squares = (np.square(both).sum(axis=1) @ importance.astype(np.float64)).tolist()
    return error, squares
