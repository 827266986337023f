"""The small files of a plan: config.json, halfbyte.json and what goes beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from halfbyte.dialects import Dialect, unquantized_config
from halfbyte.dialects.quantization_config import OWN, STOP
from halfbyte.formats import Format
from halfbyte.models import Weight
from halfbyte.plan.calibration_use import CalibrationUse
from halfbyte.recipes import Recipe
from halfbyte.source.checkpoint import Checkpoint

CONFIG, INDEX, PROVENANCE = "config.json", "model.safetensors.index.json", "halfbyte.json"
# part of the fingerprint: raise it when the same plan would give other bytes
PLAN_VERSION = 3


def make_settings(
    dialect: Dialect,
    quantized: list[tuple[Weight, Format]],
    kept: list[Weight],
    activations: Mapping[str, Any],
    caches: Mapping[str, Any],
) -> dict[str, Any]:
    """The ``quantization_config`` of the output, with what it says of activations and of the KV cache."""
    return dialect.config(quantized, kept, activations) | dict(caches)


def make_config(
    checkpoint: Checkpoint, dialect: Dialect, settings: Mapping[str, Any], extra: Mapping[str, Any] | None
) -> bytes | None:
    """config.json: the source's, unquantized, with these settings and further keys; None where files hold it."""
    source, config = checkpoint.dialect, checkpoint.inventory.config
    config = unquantized_config(source.package.original_config(config) if source else config) | dict(extra or {})
    config["quantization_config"] = settings
    if dialect.name == OWN:
        config |= STOP
    return None if dialect.package.standalone else json_bytes(dialect.package.config_json(config))


def make_provenance(
    checkpoint: Checkpoint, recipe: Recipe, dialect: Dialect, use: CalibrationUse | None
) -> dict[str, Any]:
    """halfbyte.json: where an output comes from, and the recipe that it was made with."""
    inventory = checkpoint.inventory
    provenance: dict[str, Any] = {
        "halfbyte": PLAN_VERSION,
        "source": {
            "name": inventory.source.rstrip("/").rsplit("/", 1)[-1],
            "revision": inventory.revision,
            "fingerprint": inventory.fingerprint,
        },
        "dialect": dialect.name,
        "recipe": spelled_out(recipe),
    }
    if use:
        provenance |= use.provenance()
    return provenance


def json_bytes(content: Any) -> bytes:
    """JSON with an indent and a line break at its end, in UTF-8."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def spelled_out(recipe: Recipe) -> dict[str, Any]:
    """A recipe that can be parsed again, with the defaults of this release spelled out."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    for rule in content["rules"]:
        if "format" not in rule:
            for key in ("scale_search", "global_scale", "if_not_divisible"):
                del rule[key]
    return content
