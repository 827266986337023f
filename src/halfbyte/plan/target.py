"""Recipes that refit weights while a calibration rounds them: which weights, and whose such a calibration is."""

from __future__ import annotations

from typing import Any

from halfbyte.calibration import Calibration
from halfbyte.calibration.rounded import is_rounded, method_of
from halfbyte.dialects import Dialect
from halfbyte.errors import RecipeError
from halfbyte.plan.configuration import spelled_out
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.refusal import Refusal
from halfbyte.recipes import Method, Recipe, resolve
from halfbyte.source.checkpoint import Checkpoint


def without_calibration(recipe: Recipe) -> Recipe:
    """The same recipe, asking nothing that only a calibration can tell; formats and rounding stay."""
    rules = [r.model_copy(update={"activations": None}) if r.activations == "static" else r for r in recipe.rules]
    return recipe.model_copy(update={"calibration": "optional", "kv_cache": None, "rules": tuple(rules)})


def methods_of(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, Method]:
    """How a recipe wants weights rounded, by name; weights without a method are left out."""
    weights = [weight.untransposed() for weight in checkpoint.weights]
    decisions = resolve(recipe, weights)
    return {w.name: d.method for w, d in zip(weights, decisions, strict=True) if d.method is not None}


def rounded_by(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """What statistics say of the recipe and the dialect that their weights were rounded for."""
    return {"recipe": spelled_out(recipe), "dialect": plan.dialect.name, "target": "residual"}


def check_rounded(recipe: Recipe, dialect: Dialect, calibration: Calibration) -> Refusal | None:
    """Refuse a calibration that was rounded for another recipe or dialect, or one that was not where it must be."""
    statistics = calibration.statistics
    made = method_of(statistics.description) if statistics else None
    if made is None:
        if not recipe.refits:
            return None
        return Refusal(
            f"recipe {recipe.name} says `target: residual`, which rounds weights while it calibrates, so statistics "
            "alone do not do; give the text itself (--calibration TEXT)",
            RecipeError,
        )
    if made.get("recipe") == spelled_out(recipe) and made.get("dialect") == dialect.name:
        return None
    stated = made.get("recipe")
    name = stated.get("name") if isinstance(stated, dict) else None
    return Refusal(
        f"{calibration.name} holds weights that were rounded by recipe {name} for the dialect {made.get('dialect')}, "
        f"so it serves no other; give the text (--calibration TEXT) to calibrate for {recipe.name} in {dialect.name}",
        RecipeError,
    )


__all__ = ["check_rounded", "is_rounded", "methods_of", "rounded_by", "without_calibration"]
