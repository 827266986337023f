"""Where config.json says how a checkpoint is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.checkpoint import Inventory
from halfbyte.checkpoint.config import QUANTIZATION, parts_of
from halfbyte.checkpoint.foreign import Fields

OWN = "halfbyte"
STOP = {"transformers_weights": "nothing that it can read alone: pip install halfbyte and import halfbyte.transformers"}
"""In config.json of the dialect halfbyte: without halfbyte, transformers would fill the model with random numbers and
warn once. With this it refuses to load, since the name is no safetensors file's, and its error shows the text."""


def quantization_config_of(inventory: Inventory) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint's config.json or of a configuration in it, {} if there is none."""
    return dict(quantization_fields(inventory).values)


def quantization_fields(inventory: Inventory) -> Fields:
    """The same by type; the outermost one counts, and a text model's before that of another part."""
    for place, part in parts_of(inventory.config):
        for key in QUANTIZATION:
            settings = part.get(key)
            if isinstance(settings, dict) and settings:
                return Fields(settings, f"config.json of {inventory.source}", f"{place}.{key}" if place else key)
    return Fields(None, f"config.json of {inventory.source}")


def unquantized_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without its ``quantization_config``, wherever it stands."""
    parts = {id(part) for _, part in parts_of(config)}

    def without(value: Any) -> Any:
        if isinstance(value, list):
            return [without(inner) for inner in value]
        return unquantized_config(value) if id(value) in parts else value

    return {
        key: without(value)
        for key, value in config.items()
        if key not in QUANTIZATION and not (key in STOP and STOP[key] == value)
    }


def is_fp8_cache(scheme: Any) -> bool:
    """Whether a ``kv_cache_scheme`` is FP8 with one calibrated scale for all heads."""
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    return isinstance(scheme, dict) and {key: scheme.get(key, value) for key, value in wanted.items()} == wanted
