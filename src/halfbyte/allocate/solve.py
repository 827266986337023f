"""The allocation itself: one format for each unit, the least predicted loss within a number of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfbyte.allocate.choices import AllocationUnit, Choice
from halfbyte.allocate.sizes import human
from halfbyte.errors import HalfbyteError, PlanError

GAP = 1e-4  # relative to the best possible loss


@dataclass
class Allocation:
    """``chosen`` is one choice for each unit; ``bytes`` and ``loss`` are their sums."""

    chosen: list[Choice]

    @property
    def bytes(self) -> int:
        """Stored bytes of all units."""
        return sum(choice.bytes for choice in self.chosen)

    @property
    def loss(self) -> float:
        """Return the predicted loss of all units."""
        return sum(choice.loss for choice in self.chosen)


def allocate(units: Sequence[AllocationUnit], budget: int) -> Allocation:
    """The choices with the least sum of losses whose bytes are at most ``budget``.

    A multiple-choice knapsack, solved by HiGHS to a relative gap of 1e-4. PlanError, with the least possible size,
    where even the smallest formats are too large.
    """
    least = check_budget(units, budget)
    solver = silent_solver()
    solver.setOptionValue("mip_rel_gap", GAP)
    # numbers around one suit its tolerances
    scale = max((c.loss for unit in units for c in unit.choices), default=0.0) or 1.0
    flat: list[Choice] = []
    variables: list[Any] = []
    for unit in units:
        some = _useful(unit.choices)
        unit_variables = [solver.addBinary(obj=choice.loss / scale) for choice in some]
        solver.addConstr(solver.qsum(unit_variables) == 1)
        flat += some
        variables += unit_variables
    solver.addConstr(solver.qsum(c.bytes / budget * v for c, v in zip(flat, variables, strict=True)) <= 1)
    solver.run()
    values = solver.getSolution().col_value
    allocation = Allocation([choice for choice, value in zip(flat, values, strict=True) if value > 0.5])
    if len(allocation.chosen) != len(units):
        raise PlanError(f"the solver found no allocation ({solver.getModelStatus()})")
    if allocation.bytes > budget:
        # over by a tolerance of the solver, which counts in fractions of the budget
        return allocate(units, max(least, budget - 2 * (allocation.bytes - budget)))
    return allocation


def check_budget(units: Sequence[AllocationUnit], budget: int) -> int:
    """The least bytes that the units can have; PlanError if that is more than ``budget``, or there is no solver."""
    _highspy()
    least = sum(min(c.bytes for c in unit.choices) for unit in units)
    if least > budget:
        raise PlanError(
            f"the smallest formats need {human(least)} for these weights, {human(least - budget)} more than there are; "
            "raise the budget, or allow smaller formats or more roles"
        )
    return least


def frontier(units: Sequence[AllocationUnit], points: int = 24) -> list[Allocation]:
    """Allocations from the smallest to the largest possible size, evenly spaced: the Pareto curve."""
    smallest = sum(min(c.bytes for c in unit.choices) for unit in units)
    largest = sum(max(c.bytes for c in unit.choices) for unit in units)
    allocations = [allocate(units, int(budget)) for budget in np.linspace(smallest, largest, points)]
    return [a for i, a in enumerate(allocations) if i == 0 or a.bytes > allocations[i - 1].bytes]


def _useful(choices: Sequence[Choice]) -> list[Choice]:
    """Without those that cost more bytes than another that loses no more."""
    best: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bytes, c.loss)):
        if not best or choice.loss < best[-1].loss:
            best.append(choice)
    return best


def silent_solver() -> Any:
    """Make a ``highspy.Highs`` that never prints; HalfbyteError where highspy is not installed.

    HiGHS 1.16 prints a banner already in its constructor, while it sets up its callbacks: an option set on the finished
    object comes too late.
    """

    class Silent(_highspy().Highs):  # type: ignore[misc]
        def enableCallbacks(self) -> None:  # noqa: N802
            self.silent()
            super().enableCallbacks()

    solver = Silent()
    solver.silent()  # for a version whose constructor sets up no callbacks
    return solver


def _highspy() -> Any:
    try:
        import highspy
    except ImportError as error:
        raise HalfbyteError(
            f"allocation needs the solver HiGHS ({error}); install it with: pip install 'halfbyte[allocate]'"
        ) from error
    return highspy
