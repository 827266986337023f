"""Which models use their embeddings as output weights where config.json does not say so."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from halfbyte.checkpoint.config import text_parts
from halfbyte.models.strict_yaml import load_yaml


@cache
def tied_by_default() -> frozenset[str]:
    """Values of ``model_type`` whose configuration class in transformers has ``tie_word_embeddings=True``."""
    text = resources.files("halfbyte.models").joinpath("tied_by_default.yaml").read_text(encoding="utf-8")
    return frozenset(load_yaml(text)["model_types"])


def is_tied(config: Mapping[str, Any]) -> bool:
    """Tell whether a model's output weights are its embeddings: as config.json says, else as its classes say.

    A composite model is tied by default where both its own class and that of its text model say so.
    """
    parts = text_parts(config)
    stated = [part["tie_word_embeddings"] for part in parts if part.get("tie_word_embeddings") is not None]
    if stated:
        return any(stated)
    kinds = [part["model_type"] for part in parts if part.get("model_type")]
    return bool(kinds) and all(kind in tied_by_default() for kind in kinds)
