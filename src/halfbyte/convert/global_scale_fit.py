"""Global scales that rules want fitted (``global_scale: soar``): the work, slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.convert.pipeline import Task
from halfbyte.formats.arrays import Doubles
from halfbyte.plan.shards import Item
from halfbyte.search import get_search, global_scale
from halfbyte.search.soar import Fit, row_sums

Floats = NDArray[np.float32]
Piece = tuple[int, int, int]
"""Number of an item and its first and last leading index, the last one exclusive."""
Values = Callable[[int, int, int], tuple[NDArray[Any], Floats | None]]
"""The rows of a piece, in the space in which they are encoded, and the importance of their columns."""


def shared_scale(
    items: Sequence[Item], pieces: Sequence[Piece], amax: Floats, global_scale_inv: bool, values: Values
) -> Generator[list[Task], None, Floats]:
    """Tasks, step by step, that fit the one global scale of matrices cut into pieces; returns it, FP32 [].

    Importance counts where all of the matrices have it, since errors in other units cannot be added up.
    """
    fmt = items[0].format
    assert fmt is not None
    if not all(item.weighted for item in items):
        values = partial(_unweighted, values)
    fit = Fit(float(global_scale(amax, fmt, get_search(items[0].search))))
    while not fit.done:
        sums: dict[Piece, Doubles] = {}
        yield [partial(_sum, items[piece[0]], piece, fit.scale, global_scale_inv, values, sums) for piece in pieces]
        fit.step(sums.values())
    return np.asarray(fit.best)


def _unweighted(values: Values, *piece: int) -> tuple[NDArray[Any], None]:
    return values(*piece)[0], None


def _sum(
    item: Item, piece: Piece, scale: np.float32, global_scale_inv: bool, values: Values, sums: dict[Piece, Doubles]
) -> None:
    assert item.format is not None
    rows, importance = values(*piece)
    sums[piece] = row_sums(rows, item.format.plain, item.search, scale, importance, global_scale_inv)
