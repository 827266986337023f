"""What a recipe cannot reach in a model: matrices without a known role, and experts that are not there."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.errors import PlanError
from halfbyte.models import Weight
from halfbyte.models.roles import bare_role, is_under
from halfbyte.plan.shards import Item
from halfbyte.recipes import Recipe
from halfbyte.recipes.resolve import UNMATCHED
from halfbyte.source.checkpoint import FLOATS

LIMIT = 0.1
"""The share of the parameters of matrices up to which a conversion goes on by itself."""


def unrecognised(items: Sequence[Item]) -> list[Item]:
    """Kept matrices that no role was found for, so that rules for roles could not select them."""
    return [
        item
        for item in items
        if item.action == "keep"
        and item.reason == UNMATCHED.reason
        and bare_role(item.weight.role) == "other"
        and len(item.weight.shape) > 1
        and item.weight.dtype in FLOATS
    ]


def unrecognised_share(items: Sequence[Item]) -> float:
    """Their share of the parameters of all matrices."""
    matrices = sum(item.parameters for item in items if len(item.weight.shape) > 1)
    return sum(item.parameters for item in unrecognised(items)) / max(matrices, 1)


def check_recognised(items: Sequence[Item]) -> None:
    """PlanError, with names, where more than a tenth of the parameters of matrices has no known role."""
    share = unrecognised_share(items)
    if share > LIMIT:
        raise PlanError(
            f"no role was found for {share:.1%} of the parameters of matrices, which would stay as they are: "
            f"{_names(unrecognised(items))}; name them in rules of the recipe, or go on without them "
            "(--allow-unrecognised)"
        )


def notes_on_reach(recipe: Recipe, items: Sequence[Item]) -> list[str]:
    """Sentences about matrices without a role, and about rules for experts of a model that has none."""
    notes, without = [], unrecognised(items)
    if without:
        share = unrecognised_share(items)
        notes.append(f"no role was found for {share:.1%} of the parameters of matrices, kept: {_names(without)}")
    experts = [rule for rule in recipe.rules if any(is_under(bare_role(pattern), "experts") for pattern in rule.match)]
    if experts and not any(_is_expert(item.weight) for item in items):
        notes.append(f"recipe {recipe.name} is for mixtures of experts, and this model has no experts")
    return notes


def _is_expert(weight: Weight) -> bool:
    return is_under(bare_role(weight.role), "experts")


def _names(items: Sequence[Item]) -> str:
    shown = ", ".join(item.weight.sources[0] for item in items[:3])
    return f"{shown} and {len(items) - 3} more" if len(items) > 3 else shown
