"""Weights that a calibration rounded as it went, in the files of its statistics: codes, scales, and the error left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import CheckpointError
from halfbyte.formats import Format, QuantizedTensor

if TYPE_CHECKING:
    from halfbyte.calibration.statistics import Statistics

KINDS = ("codes", "scales", "offsets", "global_scale", "global_scale_inv", "rotation")
OBJECTIVE = "objective"
"""Squared error and squares of outputs, FP64 [2] or [E, 2], against the target that was rounded."""


def to_arrays(tensor: QuantizedTensor, objective: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    """The arrays of a rounded weight by kind, as ``write_part`` takes them."""
    stored = {kind: getattr(tensor, kind) for kind in KINDS}
    return {kind: np.asarray(a) for kind, a in stored.items() if a is not None} | {OBJECTIVE: objective}


def is_rounded(statistics: Statistics | None, weight: str) -> bool:
    """Whether statistics hold a weight rounded."""
    return statistics is not None and statistics.array(weight, "codes") is not None


def read_rounded(
    statistics: Statistics, weight: str, fmt: Format, shape: tuple[int, ...], first: int, stop: int
) -> QuantizedTensor:
    """Rows first..stop of a matrix of a ``shape``, or experts first..stop of a stack.

    Rows are cut where blocks of the format end. CheckpointError where what is stored is of another format or shape.
    """
    arrays: dict[str, Any] = {kind: statistics.array(weight, kind) for kind in KINDS}
    expected = fmt.parts(shape)
    for kind, (dtype, size) in expected.items():
        stored = arrays[kind]
        if stored is None or stored.shape != tuple(size) or stored.dtype != np.dtype(dtype):
            raise CheckpointError(
                f"{statistics.folder} holds {weight} rounded, but not as {fmt.name} {list(shape)}; calibrate again"
            )
    taken: dict[str, Any] = {}
    for kind, stored in arrays.items():
        if stored is None:
            continue
        cut = stored
        if len(shape) > 2:
            cut = stored[first:stop]
        elif kind in ("codes", "scales", "offsets") and stored.ndim == 2:
            per = max(1, -(-shape[0] // stored.shape[0])) if kind != "codes" else 1
            cut = stored[first // per : -(-stop // per)]
        taken[kind] = np.ascontiguousarray(cut) if np.ndim(cut) else np.array(cut)
    return QuantizedTensor(fmt, (stop - first, *shape[1:]), **taken)


def objective_of(statistics: Statistics, weight: str, first: int, stop: int) -> tuple[float, float]:
    """Squared error and squares of outputs of experts first..stop, or of a matrix where its first row is asked for."""
    stored = statistics.array(weight, OBJECTIVE)
    if stored is None:
        return 0.0, 0.0
    if stored.ndim == 1:
        return (float(stored[0]), float(stored[1])) if first == 0 else (0.0, 0.0)
    error, squares = stored[first:stop].sum(axis=0)
    return float(error), float(squares)


def method_of(description: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the statistics say of the recipe that they were rounded by; None for statistics alone."""
    made = description.get("rounded")
    return made if isinstance(made, dict) else None
