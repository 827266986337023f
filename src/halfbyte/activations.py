"""How engines quantize the activations that meet quantized weights: what a recipe asks, what a source does already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from halfbyte.dialects import Dialect
from halfbyte.dialects.modules import modules
from halfbyte.errors import PlanError
from halfbyte.formats import Format
from halfbyte.models import Weight
from halfbyte.recipes import Decision
from halfbyte.shards import Item
from halfbyte.view import Checkpoint


def choose(items: Iterable[Item], decisions: Iterable[Decision], dialect: Dialect) -> None:
    """Note what rules ask on their items; PlanError where the dialect's engines cannot do it."""
    for item, decision in zip(items, decisions, strict=True):
        if item.format is None or decision.activations is None:
            continue
        problem = dialect.activations_problem(item.format, decision.activations)
        if problem:
            raise PlanError(f"{item.weight.name}: {problem}")
        item.activations = decision.activations


def settled(checkpoint: Checkpoint, items: Sequence[Item], dialect: Dialect) -> dict[str, Any]:
    """Weights by name, and how their inputs are quantized: the word of a rule, or the source's own arguments.

    A source has its say where its dialect is the output's and the weight keeps its format. PlanError where a rule
    asks for calibrated scales and the output has none for a module.
    """
    found: dict[str, Any] = {}
    names = {output.name for item in items for output in item.outputs}
    for item in items:
        fmt = item.format or checkpoint.formats.get(item.weight.name)
        if fmt is None or not item.outputs:
            continue
        if item.activations is not None:
            missing = [name for name in _scales(item.weight, fmt, dialect) if name not in names]
            if item.activations == "static" and missing:
                raise PlanError(
                    f"{item.weight.name}: the recipe wants activations with calibrated scales (static), but there is "
                    f"no {missing[0]}; start from a source that has them, or ask for other activations"
                )
            found[item.weight.name] = item.activations
        elif checkpoint.dialect is dialect and checkpoint.formats.get(item.weight.name) == fmt:
            stated = dialect.activations_of(checkpoint.inventory, item.weight)
            if stated is None:
                continue
            scales = _scales(item.weight, fmt, dialect) if stated and stated.get("dynamic") is not True else []
            if all(name in names for name in scales):
                found[item.weight.name] = stated
    return found


def _scales(weight: Weight, fmt: Format, dialect: Dialect) -> list[str]:
    scale = dialect.input_scale(fmt)
    return [module.name + scale.ending for module in modules(weight)] if scale else []
