"""Where config.json says how a checkpoint is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.checkpoint import Inventory

# the second is an older name, the third MLX's
_SETTINGS = ("quantization_config", "compression_config", "quantization")
OWN = "halfbyte"
STOP = {"transformers_weights": "nothing that it can read alone: pip install halfbyte and import halfbyte.transformers"}
"""In config.json of the dialect halfbyte: without halfbyte, transformers would fill the model with random numbers and
warn once. With this it refuses to load, since the name is no safetensors file's, and its error shows the text."""


def quantization_config_of(inventory: Inventory) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint's config.json or of its text model, {} where there is none."""
    text = inventory.config.get("text_config")
    for part in (inventory.config, text if isinstance(text, dict) else {}):
        for key in _SETTINGS:
            settings = part.get(key)
            if isinstance(settings, dict) and settings:
                return settings
    return {}


def unquantized_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without its ``quantization_config``, wherever it stands."""
    plain = {key: value for key, value in config.items() if key not in _SETTINGS and STOP.get(key) != value}
    text = plain.get("text_config")
    if isinstance(text, dict):
        plain["text_config"] = {key: value for key, value in text.items() if key not in _SETTINGS}
    return plain


def is_fp8_cache(scheme: Any) -> bool:
    """Whether a ``kv_cache_scheme`` is FP8 with one calibrated scale for all heads."""
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    return isinstance(scheme, dict) and {key: scheme.get(key, value) for key, value in wanted.items()} == wanted
