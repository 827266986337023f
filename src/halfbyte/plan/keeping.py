"""Recipes with one more rule, which keeps weights that a conversion could not write in their format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.files import parse_object, read_small
from halfbyte.checkpoint.journal import read_recipe
from halfbyte.errors import CheckpointError
from halfbyte.models.tied import is_tied
from halfbyte.plan.conversion_plan import PROVENANCE, Plan
from halfbyte.recipes import Recipe, Rule

REASON = "its format cannot hold its values, or those of a weight that engines hold together with it"

Remake = Callable[[Recipe], Plan]
"""Makes a plan like another one, by another recipe."""


def recipe_keeping(plan: Plan, names: Iterable[str]) -> Recipe:
    """The plan's recipe with a last rule that keeps these weights, and all that engines hold together with them."""
    weights = [item.weight for item in plan.items]
    named = {*names, *kept_by(plan)}
    groups = {w.group for w in weights if w.name in named and w.group}
    ends = {w.name for w in weights if w.role in ("embedding", "lm_head")}
    if is_tied(plan.checkpoint.inventory.config) and named & ends:
        named |= ends
    rule = Rule(
        match=tuple(_pattern(w.name) for w in weights if w.name in named or w.group in groups), keep=True, reason=REASON
    )
    rules = plan.recipe.rules[:-1] if kept_by(plan) else plan.recipe.rules
    return plan.recipe.model_copy(update={"rules": (*rules, rule)})


def kept_by(plan: Plan) -> list[str]:
    """Names of the weights that a rule of ``recipe_keeping`` keeps in a plan."""
    last = plan.recipe.rules[-1]
    return _matched(plan, last.match) if last.reason == REASON else []


def continued_recipe(plan: Plan, out: Path) -> Recipe | None:
    """The recipe of an output in ``out``, finished or not, that is the plan's with a rule of ``recipe_keeping``.

    None for any other output, and for none.
    """
    rules = (read_recipe(out) or _recipe_of(out / PROVENANCE)).get("rules")
    last = rules[-1] if isinstance(rules, list) and rules else None
    if not isinstance(last, dict) or last.get("reason") != REASON or not isinstance(last.get("match"), list):
        return None
    names = _matched(plan, last["match"])
    return recipe_keeping(plan, names) if names else None


def _pattern(name: str) -> str:
    return f"re:^{re.escape(name)}$"


def _matched(plan: Plan, patterns: Iterable[Any]) -> list[str]:
    stated = {pattern for pattern in patterns if isinstance(pattern, str)}
    return [item.weight.name for item in plan.items if _pattern(item.weight.name) in stated]


def _recipe_of(path: Path) -> Mapping[str, Any]:
    try:
        stated = parse_object(read_small(path), PROVENANCE).get("recipe")
    except CheckpointError:
        return {}
    return stated if isinstance(stated, dict) else {}
