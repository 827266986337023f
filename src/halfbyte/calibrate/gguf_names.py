"""Which weight of a checkpoint a tensor name of llama.cpp means, by role and layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources

from halfbyte.models import Weight
from halfbyte.models.patterns import Templates, normalise, split_numbers
from halfbyte.models.roles import ROLES
from halfbyte.models.strict_yaml import load_yaml


@cache
def _roles() -> dict[str, tuple[str, ...]]:
    text = (resources.files("halfbyte.calibrate") / "gguf_names.yaml").read_text(encoding="utf-8")
    return {template: tuple(roles) for template, roles in load_yaml(text).items()}


@cache
def _templates() -> Templates:
    return Templates((template, template) for template in _roles())


def gguf_targets(names: Iterable[str], weights: Sequence[Weight]) -> dict[str, Weight]:
    """The weight of every name that has one. MTP layers count on from the main model's, as in GGUF files."""
    table = _by_block(weights)
    result: dict[str, Weight] = {}
    for name in names:
        found = _templates().find(normalise(name))
        if found is None:
            continue
        block = int(split_numbers(name)[2 * found.layer + 1]) if found.layer is not None else None
        keys = ((role, block) for role in _roles()[found.value])
        target = next((table[key] for key in keys if key in table), None)
        if target is not None:
            result[name] = target
    return result


def _by_block(weights: Sequence[Weight]) -> dict[tuple[str, int | None], Weight]:
    main = [w.layer for w in weights if w.layer is not None and not w.role.startswith(("mtp.", "vision."))]
    count = max(main, default=-1) + 1
    table: dict[tuple[str, int | None], Weight] = {}
    for weight in weights:
        role, block = weight.role, weight.layer
        if role.startswith("mtp."):
            block = block or 0
            block = block if block >= count else block + count
            role = role if role in ROLES else role[len("mtp.") :]
        table.setdefault((role, block), weight)
    return table
