"""Tensor scales that rules want fitted (``tensor_scale: soar``): what is refused, and the work slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.dialects import Dialect
from halfbyte.errors import PlanError, RecipeError
from halfbyte.formats import BlockFormat, get_format
from halfbyte.models import Weight
from halfbyte.pipeline import Task
from halfbyte.recipes import Decision
from halfbyte.search import get_search, tensor_scale
from halfbyte.search.soar import ITERATIONS, Doubles, Fit, row_sums, unfittable
from halfbyte.shards import Item

Floats = NDArray[np.float32]
Piece = tuple[int, int, int]
"""Number of an item and its first and last leading index, the last one exclusive."""
Values = Callable[[int, int, int], tuple[NDArray[Any], Floats | None]]
"""The rows of a piece, in the space in which they are encoded, and the importance of their columns."""


def check_fitted(weight: Weight, decision: Decision, dialect: Dialect) -> None:
    """RecipeError where a rule wants to fit what its format does not have, PlanError where no fit can be stored."""
    if decision.tensor_scale != "soar":
        return
    assert decision.format is not None
    wish = f"rule {decision.rule} of the recipe says `tensor_scale: soar` for {weight.name}"
    problem = unfittable(get_format(decision.format))
    if problem:
        raise RecipeError(f"{wish}, but {problem}; leave it out or choose a format such as nvfp4")
    if dialect.power_of_two:
        raise PlanError(
            f"{wish}, but {dialect.name} stores only powers of two as tensor scales; leave it out or choose another "
            "dialect"
        )


def fitted_note(items: Iterable[Item]) -> list[str]:
    """What a fit costs."""
    count = sum(item.fitted and item.action == "quantize" for item in items)
    return [f"tensor scales of {count} weights are fitted: up to {ITERATIONS + 1} more encodings of each"] * bool(count)


def shared_scale(
    items: Sequence[Item], pieces: Sequence[Piece], amax: Floats, divisor: bool, values: Values
) -> Generator[list[Task], None, Floats]:
    """Tasks, step by step, that fit the one tensor scale of matrices cut into pieces; returns it, FP32 [].

    Importance counts where all of the matrices have it, since errors in other units cannot be added up.
    """
    fmt = items[0].format
    assert isinstance(fmt, BlockFormat)
    if not all(item.weighted for item in items):
        values = partial(_unweighted, values)
    fit = Fit(float(tensor_scale(amax, fmt, get_search(items[0].search))))
    while not fit.done:
        sums: dict[Piece, Doubles] = {}
        yield [partial(_sum, items[piece[0]], piece, fit.scale, divisor, values, sums) for piece in pieces]
        fit.step(sums.values())
    return np.asarray(fit.best)


def _unweighted(values: Values, *piece: int) -> tuple[NDArray[Any], None]:
    return values(*piece)[0], None


def _sum(
    item: Item, piece: Piece, scale: np.float32, divisor: bool, values: Values, sums: dict[Piece, Doubles]
) -> None:
    assert isinstance(item.format, BlockFormat)
    rows, importance = values(*piece)
    sums[piece] = row_sums(rows, item.format.plain, item.search, scale, importance, divisor)
