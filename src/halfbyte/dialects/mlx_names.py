"""Names of MLX's modules and names of the original checkpoint, both ways (mlx-lm 0.32, mlx-vlm 0.7).

mlx-lm's ``sanitize`` takes the original names of everything but experts, which its modules hold as one stack per
projection: ``switch_mlp.gate_proj`` and so on, in gpt-oss ``experts.gate_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import CheckpointError
from halfbyte.models import Weight

_TEXT = "_text"
_WRAPPED = ("qwen3_5", "qwen3_5_moe")
# original prefix -> prefix of the module, in a model that wraps its text model
_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("model.visual.", "vision_tower."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
_STACK = re.compile(r"(.*\.mlp)\.experts\.(gate_up|down)_proj$")
_MODULE = re.compile(r"(.*\.mlp)\.(?:switch_mlp|experts)\.(gate|up|down)_proj$")
BIASES = ("gate_up_proj_bias", "down_proj_bias")
"""Endings of the biases of gpt-oss' experts."""


@dataclass(frozen=True)
class Model:
    """What names depend on.

    ``kind``: the model type, without ``_text``; ``nested``: its text model has a configuration of its own;
    ``tied``: input and output embeddings are one.
    """

    kind: str = ""
    nested: bool = False
    tied: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Model:
        """Read what names depend on from config.json."""
        text = config.get("text_config")
        tied = any(isinstance(part, Mapping) and part.get("tie_word_embeddings") for part in (config, text))
        return cls(str(config.get("model_type", "")).removesuffix(_TEXT), isinstance(text, Mapping), tied)

    @property
    def wrapped(self) -> bool:
        """Whether MLX's model holds the text model as a part."""
        return self.nested or self.kind in _WRAPPED

    def path(self, module: str) -> str:
        """The path in MLX's model of a module of the files."""
        for ours, theirs in _PREFIXES if self.wrapped else ():
            if f"{module}.".startswith(ours):
                return (theirs + f"{module}."[len(ours) :]).removesuffix(".")
        return module

    def original(self, name: str) -> str:
        """The original name of a tensor, whichever of both it has; experts stay as they are."""
        for ours, theirs in _PREFIXES if self.wrapped else ():
            if name.startswith(theirs):
                text = theirs == "language_model.model."
                return (ours if self.nested or not text else "model.") + name[len(theirs) :]
        return name

    def projections(self, weight: Weight) -> Iterator[tuple[str, tuple[int, int, int] | None, int]]:
        """Module, rows of the weight (first, stop, step) and their number, of each projection in a stack [E, N, K]."""
        match = _STACK.match(weight.name)
        if match is None:
            raise CheckpointError(
                f"{weight.name} has the shape {list(weight.shape)} of a stack of experts and the name of a matrix; the "
                "checkpoint is damaged"
            )
        n = weight.shape[-2]
        where = f"{match[1]}.{'experts' if self.kind == 'gpt_oss' else 'switch_mlp'}"
        if match[2] == "down":
            yield f"{where}.down_proj", None, n
            return
        for i, (part, first, stop) in enumerate(weight.row_parts):
            rows = (i, n, len(weight.row_parts)) if weight.interleaved else (first, stop, 1)
            yield f"{where}.{part}_proj", rows, stop - first


def config_for_mlx(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the model type and the settings that mlx-lm looks for."""
    renamed = dict(config)
    kind = str(renamed.get("model_type", "")).removesuffix(_TEXT)
    if kind in _WRAPPED:
        renamed["model_type"] = kind
    for part in _parts(renamed):
        part |= {key: value for key, value in _older(part).items() if part.get(key) is None}
    return renamed


def original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the source's config.json: the inverse of ``config_for_mlx``."""
    original = dict(config)
    if original.get("model_type") in _WRAPPED and not isinstance(original.get("text_config"), dict):
        original["model_type"] += _TEXT
    for part in _parts(original):
        for key, value in _older(part).items():
            if part.get(key) == value:
                del part[key]
        rope = part.get("rope_parameters")
        if isinstance(rope, dict) and "type" in rope and "rope_type" not in rope:
            # mlx_lm.convert renames it
            part["rope_parameters"] = {"rope_type" if key == "type" else key: value for key, value in rope.items()}
    return original


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and a copy, put in place, of that of its text model."""
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = dict(text)
        yield config["text_config"]
    yield config


def _older(config: Mapping[str, Any]) -> dict[str, Any]:
    """What newer configurations say in other words than mlx-lm reads."""
    older = {}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        older["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            older["rope_scaling"] = rope
    if "num_local_experts" in config and str(config.get("model_type")).startswith("qwen"):
        older["num_experts"] = config["num_local_experts"]
    return older


def is_stack(weight: Weight) -> bool:
    """Whether a weight is a stack of experts that MLX's models hold by projection; MTP layers stay as they are."""
    return len(weight.shape) == 3 and bool(_STACK.match(weight.name)) and not weight.role.startswith("mtp.")


def stack_of(module: str) -> tuple[str, str] | None:
    """The original name of the stack that a projection of experts is part of, and which; None for other modules."""
    match = _MODULE.match(module)
    if not match:
        return None
    return f"{match[1]}.experts.{'down' if match[2] == 'down' else 'gate_up'}_proj", match[2]
