"""How engines quantize the activations that meet quantized weights: what a recipe asks, what a source does already."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from halfbyte.calibration import Calibration
from halfbyte.dialects import Dialect, OutputTensor
from halfbyte.dialects.modules import modules
from halfbyte.errors import PlanError
from halfbyte.formats import Format
from halfbyte.models import Weight
from halfbyte.plan.refusal import Refusal, enforce
from halfbyte.plan.shards import Item
from halfbyte.recipes import Decision
from halfbyte.source.checkpoint import Checkpoint

CALIBRATED = "the scale of activations, from the calibration"
# the largest input becomes the largest value, times the largest block scale where there are block scales
TOPS = {"nvfp4": 6.0 * 448.0, "fp8_tensor": 448.0, "fp8_channel": 448.0}


def with_wishes(items: Iterable[Item], decisions: Iterable[Decision], dialect: Dialect) -> tuple[Item, ...]:
    """The items with what rules ask of their activations; PlanError where the dialect's engines cannot do it."""
    return tuple(_with_wish(item, decision, dialect) for item, decision in zip(items, decisions, strict=True))


def _with_wish(item: Item, decision: Decision, dialect: Dialect) -> Item:
    if item.format is None or decision.activations is None:
        return item
    enforce(check_activations(item.format, decision, dialect), item.weight.name)
    return replace(item, activations=decision.activations)


def check_activations(fmt: Format, decision: Decision, dialect: Dialect) -> Refusal | None:
    """Refuse activations that engines of the dialect cannot quantize, and static scales beside AWQ."""
    assert decision.activations is not None
    problem = dialect.activations.problem(fmt, decision.activations)
    if problem:
        return Refusal(problem)
    if decision.activations == "static" and decision.transform:
        return Refusal("AWQ changes the inputs whose scales are to be static; leave one of them out")
    return None


def calibrated_scales(items: Sequence[Item], dialect: Dialect, calibration: Calibration | None) -> tuple[Item, ...]:
    """Items for the scales that rules ask for (``static``) and that the source does not have, from statistics.

    The scale makes the largest input reach the top of the format's range. Modules that an engine multiplies in one go
    share it: the members of a fusion group, and the experts of a layer, so that one which no token reached has a
    scale too. PlanError where no token reached any of them.
    """
    statistics = calibration.statistics if calibration else None
    if statistics is None:
        return ()
    there = {output.name for item in items for output in item.outputs}
    wanted = [item for item in items if item.activations == "static" and item.format is not None]
    largest: dict[str, float] = {}
    for item in wanted:
        amax = statistics.array(item.weight.name, "amax")
        if amax is not None:
            key = _shared_by(item.weight)
            largest[key] = max(largest.get(key, 0.0), float(np.max(amax)))
    scales: list[Item] = []
    for item in wanted:
        assert item.format is not None
        top = largest.get(_shared_by(item.weight))
        if top is not None:
            scales += _scales_of(item.weight, item.format, dialect, top, there)
    return tuple(scales)


def _scales_of(weight: Weight, fmt: Format, dialect: Dialect, largest: float, there: set[str]) -> list[Item]:
    """Items for the scales of one weight's modules that are not there yet; ``largest`` of their inputs is known."""
    scale = dialect.activations.scale(fmt)
    if scale is None:
        return []
    if not 0 < largest < np.inf:
        raise PlanError(f"{weight.name}: the calibration saw no input other than zero; calibrate with more text")
    value = np.float32(largest / TOPS[fmt.name])
    number = float(np.float32(1) / value if scale.global_scale_inv else value)
    items = []
    for name in [n for n in _scale_names(weight, fmt, dialect) if n not in there]:
        buffer = Weight(name, "buffer", weight.layer, scale.shape, "F32", ())
        output = OutputTensor(name, "F32", scale.shape, "constant", constant=(number,))
        items.append(Item(buffer, "calibrate", CALIBRATED, outputs=(output,)))
    return items


def _shared_by(weight: Weight) -> str:
    """What engines multiply in one go."""
    return weight.group or f"{weight.layer} {weight.role}"


def activation_settings(checkpoint: Checkpoint, items: Sequence[Item], dialect: Dialect) -> dict[str, Any]:
    """Weights by name, and how their inputs are quantized: the word of a rule, or the source's own arguments.

    A source has its say where its dialect is the output's and the weight keeps its format. PlanError where a rule
    asks for calibrated scales and the output has none for a module.
    """
    settings: dict[str, Any] = {}
    names = {output.name for item in items for output in item.outputs}
    for item in items:
        fmt = item.format or checkpoint.formats.get(item.weight.name)
        if fmt is None or not item.outputs:
            continue
        if item.activations is not None:
            enforce(check_scales(item, fmt, dialect, names), item.weight.name)
            settings[item.weight.name] = item.activations
        elif checkpoint.dialect is dialect and checkpoint.formats.get(item.weight.name) == fmt:
            stated = dialect.activations.stated(checkpoint.inventory, item.weight)
            if stated is None:
                continue
            scales = _scale_names(item.weight, fmt, dialect) if stated and stated.get("dynamic") is not True else []
            if all(name in names for name in scales):
                settings[item.weight.name] = stated
    return settings


def check_scales(item: Item, fmt: Format, dialect: Dialect, names: Container[str]) -> Refusal | None:
    """Refuse static activations for a weight whose calibrated scales the output (``names``) lacks."""
    missing = [name for name in _scale_names(item.weight, fmt, dialect) if name not in names]
    if item.activations != "static" or not missing:
        return None
    return Refusal(
        f"the recipe wants activations with calibrated scales (static), but there is no {missing[0]}; give a "
        "calibration (--calibration), start from a source that has them, or ask for other activations"
    )


def _scale_names(weight: Weight, fmt: Format, dialect: Dialect) -> list[str]:
    scale = dialect.activations.scale(fmt)
    return [module.name + scale.ending for module in modules(weight)] if scale else []
