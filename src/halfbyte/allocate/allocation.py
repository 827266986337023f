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
from halfbyte.allocate.sizes import human
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


@dataclass(frozen=True)
class AllocateOptions:
    """What size to meet, and what to choose from.

    Exactly one of ``budget`` (bytes of all files together) and ``bits`` (per weight, over all weights) is given.
    ``formats`` are chosen from for the weights of ``roles``. ``calibration`` makes errors those of outputs. The file
    ``sensitivity`` says how much they matter (a function that makes it is called once the size is known to be
    possible); without it the model's structure does (``prior``), or nothing where all units are to be ``alike``,
    which is worse.
    """

    name: str = "allocated"
    budget: int | None = None
    bits: float | None = None
    formats: Sequence[str] = FORMATS
    roles: Sequence[str] = ("linear",)
    calibration: Calibration | None = None
    sensitivity: str | Path | Callable[[], str | Path] | None = None
    alike: bool = False

    def limit(self, parameters: int) -> int:
        """Return the bytes that a model of so many ``parameters`` may have; those of weights alone with ``bits``."""
        return self.budget if self.budget is not None else int((self.bits or 0) * parameters / 8)

    def size_of(self, plan: Plan) -> int:
        """Return the bytes of a plan that count."""
        return plan.repository_bytes if self.budget is not None else plan.data_bytes

    def comment(self, model: str) -> tuple[str, ...]:
        """Return the lines at the head of the recipe: what was asked for, and what losses were predicted from."""
        how = "errors alone" if self.alike else "errors and the model's structure"
        how = "measured sensitivities" if self.sensitivity is not None else how
        size = f"{self.budget} bytes" if self.budget is not None else f"{self.bits} bits per weight"
        importance = f" and the importance of {self.calibration.name}" if self.calibration else ""
        return (
            f"Made by `halfbyte allocate` for {model}: at most {size},",
            f"formats {', '.join(self.formats)}, roles {', '.join(self.roles)}; losses predicted from {how}"
            f"{importance}.",
        )


def allocate_recipe(
    checkpoint: Checkpoint, dialect: Dialect, options: AllocateOptions, progress: Progress | None = None
) -> Allocated:
    """Choose a format for every unit, so that the output meets the size of ``options`` and loses the least.

    Losses are predicted from measured errors (``measure``) and how much they matter. ``progress`` is called with the
    number of units measured and their total. PlanError where the size cannot be met.
    """
    if (options.budget is None) == (options.bits is None):
        raise PlanError("give either a budget in bytes or a number of bits per weight")
    units = make_units(checkpoint, dialect, options.formats, options.roles)
    draft = _Draft(checkpoint, dialect, options, units, _searches(options.formats))
    limit, others = draft.room()
    measured = None
    if options.sensitivity is not None:
        file = options.sensitivity() if callable(options.sensitivity) else options.sensitivity
        measured = measured_groups(file)
    measure(checkpoint, units, draft.searches, options.calibration, progress, measured or ())
    factors = None if options.alike else structure_factors(checkpoint.weights, is_tied(checkpoint.inventory.config))
    predict(units, measured, factors)
    return draft.fit(limit, others)


@dataclass(frozen=True)
class _Draft:
    """A recipe in the making: what is decided, by which options."""

    checkpoint: Checkpoint
    dialect: Dialect
    options: AllocateOptions
    units: list[AllocationUnit]
    searches: dict[str, str]

    def room(self) -> tuple[int, int]:
        """Return the bytes that the output may have, and those of them that are not the units' own.

        PlanError, with the smallest size that is possible, where the units do not fit.
        """
        smallest = Allocation([min(unit.choices, key=lambda c: c.bytes) for unit in self.units])
        _, plan = self._plan(smallest)
        size, limit = self.options.size_of(plan), self.options.limit(plan.parameters)
        others = size - smallest.bytes
        if limit <= others:
            raise PlanError(
                f"weights of other roles alone need {human(others)}, and the limit is {human(limit)}; the smallest "
                f"possible is {self._smallest(plan)}, or let more roles be decided (--roles)"
            )
        if size > limit:
            raise PlanError(
                f"the smallest formats need {human(size)}, more than the limit of {human(limit)}; the smallest "
                f"possible is {self._smallest(plan)}, or allow smaller formats or more roles"
            )
        check_budget(self.units, limit - others)
        return limit, others

    def fit(self, limit: int, others: int) -> Allocated:
        """Allocate until the whole output has at most ``limit`` bytes, of which ``others`` are not the units'."""
        for _ in range(_TRIES):
            chosen = allocate(self.units, limit - others)
            text, plan = self._plan(chosen)
            size = self.options.size_of(plan)
            if size <= limit:
                outside = plan.data_bytes - chosen.bytes
                return Allocated(text, plan, self.units, chosen, frontier(self.units), outside)
            others += size - limit  # headers and configuration grow with the number of tensors and rules
        raise PlanError(f"no allocation of at most {human(limit)} was found; raise the limit a little")

    def _plan(self, allocation: Allocation) -> tuple[str, Plan]:
        """Return an allocation's recipe and plan."""
        name, weights = self.options.name, self.checkpoint.weights
        comment = self.options.comment(_name(self.checkpoint))
        text = recipe_text(name, self.units, allocation.chosen, weights, self.searches, comment, self.dialect.name)
        return text, make_plan(self.checkpoint, parse_recipe(text, name), self.dialect)

    def _smallest(self, plan: Plan) -> str:
        """Return the option that asks for the size of the smallest ``plan``."""
        size = self.options.size_of(plan)
        if self.options.budget is not None:
            return f"--budget {size}"
        return f"--bits {math.ceil(8000 * size / max(plan.parameters, 1)) / 1000:g}"


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


def _searches(formats: Sequence[str]) -> dict[str, str]:
    """Searches of formats that the default cannot do: those whose scales are shared by several rows."""
    return {name: "absmax" for name in formats if name != KEEP and get_format(name).block[0] != 1}


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.inventory.source.rstrip("/").rsplit("/", 1)[-1]
