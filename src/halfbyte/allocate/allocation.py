"""From a checkpoint and a size to a recipe that meets it exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.allocate.choices import (
    KEEP,
    AllocationUnit,
    Choice,
    Progress,
    make_units,
    measure,
    measured_groups,
    predict,
)
from halfbyte.allocate.prior import structure_factors
from halfbyte.allocate.solve import Allocation, allocate, check_budget, frontier
from halfbyte.allocate.write import recipe_text
from halfbyte.calibration import Calibration
from halfbyte.dialects import Dialect, get_dialect
from halfbyte.errors import PlanError
from halfbyte.formats import get_format
from halfbyte.models.tied import is_tied
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.recipes import Recipe, parse_recipe
from halfbyte.source.checkpoint import Checkpoint

FORMATS = ("mixfp4", "nvfp4", "mxfp4", "fp8_channel", KEEP)
_TRIES = 8


@dataclass
class Allocated:
    """A recipe, its plan, and how it came about."""

    recipe: str
    plan: Plan
    units: list[AllocationUnit]
    allocation: Allocation
    frontier: list[Allocation]
    other_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON: sizes, the choice of every unit, and the Pareto curve of data bytes and predicted loss."""
        return {
            "recipe": self.plan.recipe.name,
            "data_bytes": self.plan.data_bytes,
            "repository_bytes": self.plan.repository_bytes,
            "bits_per_weight": self.plan.bits_per_weight,
            "predicted_loss": self.allocation.loss,
            "units": [
                {
                    "name": unit.name,
                    "weights": [w.name for w in unit.weights],
                    "parameters": unit.parameters,
                    "format": chosen.format,
                    "bytes": chosen.bytes,
                    "loss": chosen.loss,
                    "choices": {c.format: {"bytes": c.bytes, "error": c.error, "loss": c.loss} for c in unit.choices},
                }
                for unit, chosen in zip(self.units, self.allocation.chosen, strict=True)
            ],
            "frontier": [{"data_bytes": self.other_bytes + a.bytes, "loss": a.loss} for a in self.frontier],
        }


def allocate_recipe(
    checkpoint: Checkpoint,
    dialect: Dialect,
    name: str = "allocated",
    *,
    budget: int | None = None,
    bits: float | None = None,
    formats: Sequence[str] = FORMATS,
    roles: Sequence[str] = ("linear",),
    calibration: Calibration | None = None,
    sensitivity: str | Path | Callable[[], str | Path] | None = None,
    alike: bool = False,
    progress: Progress | None = None,
) -> Allocated:
    """Choose a format for every unit so that the output has at most ``budget`` bytes (all files together) or
    ``bits`` per weight (all weights), and lose the least.

    Losses are predicted from measured errors (``measure``) and, for how much they matter, the file ``sensitivity``
    (a function that makes it is called once the size is known to be possible); without it the model's structure
    (``prior``), or nothing where all units are to be ``alike``, which is worse. PlanError where the size cannot be met.
    """
    if (budget is None) == (bits is None):
        raise PlanError("give either a budget in bytes or a number of bits per weight")
    units = make_units(checkpoint, dialect, formats, roles)
    searches = _searches(formats)

    def plan_of(allocation: Allocation) -> tuple[str, Plan]:
        how = "errors alone" if alike else "errors and the model's structure"
        how = "measured sensitivities" if sensitivity is not None else how
        about = (
            f"Made by `halfbyte allocate` for {_name(checkpoint)}: "
            + (f"at most {budget} bytes" if budget is not None else f"at most {bits} bits per weight")
            + ",",
            f"formats {', '.join(formats)}, roles {', '.join(roles)}; losses predicted from {how}"
            + (f" and the importance of {calibration.name}." if calibration else "."),
        )
        text = recipe_text(name, units, allocation.chosen, checkpoint.weights, searches, about, dialect.name)
        return text, make_plan(checkpoint, parse_recipe(text, name), dialect)

    def size_of(plan: Plan) -> int:
        return plan.repository_bytes if budget is not None else plan.data_bytes

    smallest = Allocation([min(unit.choices, key=lambda c: c.bytes) for unit in units])
    _, plan = plan_of(smallest)
    limit = budget if budget is not None else int((bits or 0) * plan.parameters / 8)
    rest = size_of(plan) - smallest.bytes
    if limit <= rest:
        raise PlanError(
            f"weights of other roles alone need {human(rest)}, and the limit is {human(limit)}; the smallest possible "
            f"is {_smallest(size_of(plan), plan, budget)}, or let more roles be decided (--roles)"
        )
    if smallest.bytes > limit - rest:
        raise PlanError(
            f"the smallest formats need {human(size_of(plan))}, more than the limit of {human(limit)}; the smallest "
            f"possible is {_smallest(size_of(plan), plan, budget)}, or allow smaller formats or more roles"
        )
    check_budget(units, limit - rest)
    measured = None
    if sensitivity is not None:
        measured = measured_groups(sensitivity() if callable(sensitivity) else sensitivity)
    measure(checkpoint, units, searches, calibration, progress, measured or ())
    factors = None if alike else structure_factors(checkpoint.weights, is_tied(checkpoint.inventory.config))
    predict(units, measured, factors)
    for _ in range(_TRIES):
        chosen = allocate(units, limit - rest)
        text, plan = plan_of(chosen)
        if size_of(plan) <= limit:
            others = plan.data_bytes - chosen.bytes
            return Allocated(text, plan, units, chosen, frontier(units), others)
        rest += size_of(plan) - limit  # headers and configuration grow with the number of tensors and rules
    raise PlanError(f"no allocation of at most {limit} bytes was found; raise the limit a little")


def smallest_recipe(
    checkpoint: Checkpoint, formats: Sequence[str] = FORMATS, roles: Sequence[str] = ("linear",)
) -> Recipe:
    """Every unit that ``allocate_recipe`` would decide in the smallest of ``formats``: what to measure
    sensitivities with. PlanError where there is none, or where text does not reach one.
    """
    dialect = get_dialect("halfbyte")
    units = make_units(checkpoint, dialect, formats, roles)
    unrun = next((unit for unit in units if unit.weights[0].role.startswith(("mtp.", "vision."))), None)
    if unrun:
        raise PlanError(
            f"{unrun.name} takes no part in reading a text, so its sensitivity cannot be measured; leave its role"
            " out of --roles, or allocate without --text"
        )
    chosen: list[Choice] = [min(unit.choices[1:], key=lambda c: c.bytes) for unit in units]  # the first is to keep it
    text = recipe_text("smallest", units, chosen, checkpoint.weights, _searches(formats))
    return parse_recipe(text, "smallest")


def human(count: int) -> str:
    """``4131072 bytes (4.13 MB)``."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{count} bytes" + ("" if unit == "bytes" else f" ({value:.3g} {unit})")


def _smallest(size: int, plan: Plan, budget: int | None) -> str:
    """The option that asks for the smallest possible size."""
    if budget is not None:
        return f"--budget {size}"
    return f"--bits {math.ceil(8000 * size / max(plan.parameters, 1)) / 1000:g}"


def _searches(formats: Sequence[str]) -> dict[str, str]:
    """Searches of formats that the default cannot do: those whose scales are shared by several rows."""
    return {name: "absmax" for name in formats if name != KEEP and get_format(name).block[0] != 1}


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.inventory.source.rstrip("/").rsplit("/", 1)[-1]
