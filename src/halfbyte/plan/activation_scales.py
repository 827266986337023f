"""How engines quantize the activations that meet quantized weights: what a recipe asks, what a source does already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from halfbyte.calibration import Calibration
from halfbyte.dialects import Dialect, OutputTensor
from halfbyte.dialects.modules import modules
from halfbyte.errors import PlanError
from halfbyte.formats import Format
from halfbyte.models import Weight
from halfbyte.plan.shards import Item
from halfbyte.recipes import Decision
from halfbyte.source.checkpoint import Checkpoint

CALIBRATED = "the scale of activations, from the calibration"
# the largest input becomes the largest value, times the largest block scale where there are block scales
TOPS = {"nvfp4": 6.0 * 448.0, "fp8_tensor": 448.0, "fp8_channel": 448.0}


def choose(items: Iterable[Item], decisions: Iterable[Decision], dialect: Dialect) -> None:
    """Note what rules ask on their items; PlanError where the dialect's engines cannot do it."""
    for item, decision in zip(items, decisions, strict=True):
        if item.format is None or decision.activations is None:
            continue
        problem = dialect.activations.problem(item.format, decision.activations)
        if problem:
            raise PlanError(f"{item.weight.name}: {problem}")
        if decision.activations == "static" and decision.transform:
            raise PlanError(
                f"{item.weight.name}: AWQ changes the inputs whose scales are to be static; leave one of them out"
            )
        item.activations = decision.activations


def calibrated(items: Sequence[Item], dialect: Dialect, calibration: Calibration | None) -> list[Item]:
    """Items for the scales that rules ask for (``static``) and that the source does not have, from statistics.

    The scale makes the largest input reach the top of the format's range. Modules that an engine multiplies in one go
    share it: the members of a fusion group, and the experts of a layer, so that one which no token reached has a
    scale too. PlanError where no token reached any of them.
    """
    statistics = calibration.statistics if calibration else None
    if statistics is None:
        return []
    there = {output.name for item in items for output in item.outputs}
    wanted = [item for item in items if item.activations == "static" and item.format is not None]
    shared: dict[str, float] = {}
    for item in wanted:
        amax = statistics.array(item.weight.name, "amax")
        if amax is not None:
            key = _shared_by(item.weight)
            shared[key] = max(shared.get(key, 0.0), float(np.max(amax)))
    found = []
    for item in wanted:
        assert item.format is not None
        scale, largest = dialect.activations.scale(item.format), shared.get(_shared_by(item.weight))
        if scale is None or largest is None:
            continue
        if not 0 < largest < np.inf:
            raise PlanError(
                f"{item.weight.name}: the calibration saw no input other than zero; calibrate with more text"
            )
        value = np.float32(largest / TOPS[item.format.name])
        number = float(np.float32(1) / value if scale.global_scale_inv else value)
        for name in [n for n in _scales(item.weight, item.format, dialect) if n not in there]:
            weight = Weight(name, "buffer", item.weight.layer, scale.shape, "F32", ())
            output = OutputTensor(name, "F32", scale.shape, "constant", constant=(number,))
            found.append(Item(weight, "calibrate", CALIBRATED, outputs=[output]))
    return found


def _shared_by(weight: Weight) -> str:
    """What engines multiply in one go."""
    return weight.group or f"{weight.layer} {weight.role}"


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
                    f"no {missing[0]}; give a calibration (--calibration), start from a source that has them, or ask "
                    "for other activations"
                )
            found[item.weight.name] = item.activations
        elif checkpoint.dialect is dialect and checkpoint.formats.get(item.weight.name) == fmt:
            stated = dialect.activations.stated(checkpoint.inventory, item.weight)
            if stated is None:
                continue
            scales = _scales(item.weight, fmt, dialect) if stated and stated.get("dynamic") is not True else []
            if all(name in names for name in scales):
                found[item.weight.name] = stated
    return found


def _scales(weight: Weight, fmt: Format, dialect: Dialect) -> list[str]:
    scale = dialect.activations.scale(fmt)
    return [module.name + scale.ending for module in modules(weight)] if scale else []
