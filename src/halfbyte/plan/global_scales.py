"""Fitted global scales in a plan: what is refused, and what a fit costs."""

from __future__ import annotations

from collections.abc import Iterable

from halfbyte.dialects import Dialect
from halfbyte.errors import RecipeError
from halfbyte.formats import get_format
from halfbyte.models import Weight
from halfbyte.plan.refusal import Refusal
from halfbyte.plan.shards import Item
from halfbyte.recipes import Decision
from halfbyte.search.soar import ITERATIONS, unfittable


def check_fitted(weight: Weight, decision: Decision, dialect: Dialect) -> Refusal | None:
    """Refuse to fit global scales that the format does not have or that the dialect cannot store."""
    if decision.global_scale != "soar":
        return None
    assert decision.format is not None
    wish = f"rule {decision.rule} of the recipe says `global_scale: soar` for {weight.name}"
    problem = unfittable(get_format(decision.format))
    if problem:
        return Refusal(f"{wish}, but {problem}; leave it out or choose a format such as nvfp4", RecipeError)
    if dialect.spelling.power_of_two:
        return Refusal(
            f"{wish}, but {dialect.name} stores only powers of two as global scales; leave it out or choose another "
            "dialect"
        )
    return None


def fitted_note(items: Iterable[Item]) -> list[str]:
    """Say what the fit of global scales costs, where any are fitted."""
    count = sum(item.fitted and item.action == "quantize" for item in items)
    return [f"global scales of {count} weights are fitted: up to {ITERATIONS + 1} more encodings of each"] * bool(count)
