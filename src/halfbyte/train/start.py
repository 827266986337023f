"""Where training starts: a quantized checkpoint or a plan, and the plan by which its result is written."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from halfbyte.dialects import Dialect
from halfbyte.errors import HalfbyteError
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.dialect_choice import find_dialect
from halfbyte.plan.shards import Item
from halfbyte.recipes import Recipe
from halfbyte.recipes.recipe import Rule, parse_recipe
from halfbyte.search import get_search
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.smoothing import SMOOTHING_FILE


@dataclass(frozen=True)
class Origin:
    """A start: the ``checkpoint`` whose kept tensors an export copies, the ``plan`` where one was given, the plan that
    an export follows unless it is for another dialect, and the quantized items by weight name."""

    checkpoint: Checkpoint
    plan: Plan | None
    export_plan: Plan
    items: dict[str, Item]

    @property
    def name(self) -> str:
        """The last part of the checkpoint's path or hub id."""
        return self.checkpoint.inventory.source.rstrip("/").rsplit("/", 1)[-1]

    @property
    def smoothed(self) -> bool:
        """Whether AWQ changed weights of the checkpoint before they were quantized."""
        root = self.checkpoint.inventory.root
        return root is not None and (root / SMOOTHING_FILE).is_file()

    def searched(self, name: str, search: str) -> Item:
        """The item of a weight with the plan's search, or with this one where a checkpoint names none."""
        item = self.items[name]
        if item.fitted:
            raise HalfbyteError(f"the global scale of {name} is fitted (soar), so it cannot follow; take frozen scales")
        if self.plan is not None:
            return item
        get_search(search, item.format)
        return replace(item, search=search)

    def plan_for(self, dialect: str | None) -> Plan:
        """The plan of an export in a dialect; PlanError where it cannot hold a format."""
        if dialect is None or find_dialect(dialect).name == self.export_plan.dialect.name:
            return self.export_plan
        if self.plan is not None:
            return make_plan(self.checkpoint, self.plan.recipe, dialect)
        return _plan_of(self.checkpoint, find_dialect(dialect))


def origin_of(start: str | Path | Plan | Checkpoint) -> Origin:
    """Open a start; HalfbyteError for an unquantized checkpoint, and for plans that need a calibration."""
    if isinstance(start, Plan):
        if start.calibration_use is not None or any(item.method for item in start.items):
            raise HalfbyteError(
                f"the plan by {start.recipe.name} rounds with a calibration; carry it out (halfbyte.quantize) and "
                "start from its output"
            )
        return Origin(start.checkpoint, start, start, _quantized(start))
    checkpoint = start if isinstance(start, Checkpoint) else Checkpoint.open(start)
    if not checkpoint.formats or checkpoint.dialect is None:
        raise HalfbyteError(
            f"{checkpoint.inventory.source} holds no quantized weights to start from; quantize it first, or give a plan"
        )
    plan = _plan_of(checkpoint, checkpoint.dialect)
    return Origin(checkpoint, None, plan, _quantized(plan))


def _quantized(plan: Plan) -> dict[str, Item]:
    return {item.weight.name: item for item in plan.items if item.format is not None and len(item.weight.shape) > 1}


def _plan_of(checkpoint: Checkpoint, dialect: Dialect) -> Plan:
    """The plan that writes a quantized checkpoint's weights anew in their formats, and keeps the rest."""
    return make_plan(checkpoint, recipe_of(checkpoint), dialect)


def recipe_of(checkpoint: Checkpoint) -> Recipe:
    """The recipe that gives every quantized weight the format that it has."""
    names: dict[str, list[str]] = {}
    for weight in checkpoint.weights:
        if weight.name in checkpoint.formats:
            names.setdefault(checkpoint.formats[weight.name].name, []).append(f"re:^{re.escape(weight.name)}$")
    kept = parse_recipe("name: trained\nrules: [{match: all, keep: true, reason: as in the start}]", "trained")
    rules = [Rule(match=tuple(match), format=fmt, reason="trained") for fmt, match in names.items()]
    return kept.model_copy(update={"rules": (*kept.rules, *rules)})
