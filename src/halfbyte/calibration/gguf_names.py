"""Which weight of a checkpoint a tensor name of llama.cpp means, by role and layer, and how its columns are ordered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import CheckpointError
from halfbyte.models import Weight
from halfbyte.models.name_templates import Templates, normalise, split_numbers
from halfbyte.models.roles import ROLES, bare_role
from halfbyte.models.strict_yaml import load_yaml

# model types whose value heads llama.cpp's converter reorders
_TILED = "qwen3_5"


@cache
def _roles() -> dict[str, tuple[str, ...]]:
    text = (resources.files("halfbyte.calibration") / "gguf_names.yaml").read_text(encoding="utf-8")
    return {template: tuple(roles) for template, roles in load_yaml(text).items()}


@cache
def _templates() -> Templates:
    return Templates((template, template) for template in _roles())


def gguf_targets(names: Iterable[str], weights: Sequence[Weight]) -> dict[str, Weight]:
    """The weight of every name that has one. MTP layers count on from the main model's, as in GGUF files."""
    table = _by_block(weights)
    result: dict[str, Weight] = {}
    for name in names:
        template = _templates().find(normalise(name))
        if template is None:
            continue
        block = int(split_numbers(name)[2 * template.layer + 1]) if template.layer is not None else None
        keys = ((role, block) for role in _roles()[template.value])
        target = next((table[key] for key in keys if key in table), None)
        if target is not None:
            result[name] = target
    return result


def gguf_names(weights: Sequence[Weight]) -> dict[str, str]:
    """The inverse: names in GGUF files and the weights (by name) whose inputs those tensors have."""
    blocks = {w.layer for w in weights if w.layer is not None and not w.role.startswith(("mtp.", "vision."))}
    candidates = [
        template.replace("{layer}", str(block))
        for block in sorted(blocks)
        for template in _roles()
        if "{layer}" in template
    ]
    candidates += [template for template in _roles() if "{layer}" not in template]
    return {name: weight.name for name, weight in gguf_targets(candidates, weights).items()}


def head_order(weight: Weight, config: Mapping[str, Any]) -> NDArray[np.int64] | None:
    """The column of a GGUF file's tensor for each column of a checkpoint's weight; None where the order is the same.

    llama.cpp's converter puts the value heads of Qwen3.5's Gated DeltaNet in another order: heads of one key head
    stand apart by the number of key heads, not side by side (conversion/qwen.py, _LinearAttentionVReorderBase). Only
    the output projection has them along its columns.
    """
    text = config.get("text_config") or config
    if not str(text.get("model_type", "")).startswith(_TILED) or bare_role(weight.role) != "linear_attention.out":
        return None
    keys, values = (int(text.get(f"linear_num_{kind}_heads") or 0) for kind in ("key", "value"))
    columns = weight.shape[-1]
    if not keys or not values or values % keys or columns % values:
        raise CheckpointError(
            f"config.json says {keys} key heads and {values} value heads of linear attention, which does not fit the "
            f"{columns} columns of {weight.name}; the order of llama.cpp's columns cannot be known"
        )
    tiled = np.arange(columns).reshape(values // keys, keys, columns // values)
    return np.ascontiguousarray(tiled.swapaxes(0, 1)).reshape(-1)


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
