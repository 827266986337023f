"""Compact, unanchored module patterns: what engines match layer names against.

Loaders rename prefixes (``model.language_model.`` becomes ``language_model.model.``) but not regular
expressions, so a pattern starts at ``layers.`` and leaves what stands before it open.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from halfbyte.models import Weight
from halfbyte.models.roles import TOWERS

_NUMBER = re.compile(r"\d+")
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")


def spaces(weights: Iterable[Weight]) -> set[str]:
    """The first words of names beside the main model's (``mtp``, ``visual``, ``vision_tower``)."""
    first_words = set()
    for weight in weights:
        role = weight.role.removeprefix("quantized.")
        if role.startswith(("mtp.", *TOWERS)):
            first_words.add(weight.name.removeprefix("model.").split(".", 1)[0])
    return first_words - {"layers"}  # DeepSeek's MTP layers follow those of the main model and are told apart by number


def compact(chosen: Collection[str], others: Collection[str] = (), apart: Collection[str] = ()) -> list[str]:
    """``re:`` patterns that match all ``chosen`` names of modules or weights and none of ``others``.

    A kind of module that is chosen in every layer gets one pattern with ``\\d+``; otherwise its layers are
    listed. ``apart`` are spaces whose names must not be mistaken for the main model's.
    """
    avoided: dict[str, set[int]] = {}
    for name in others:
        avoided.setdefault(_kind(name, apart), set()).add(_layer(name))
    wanted: dict[str, list[str]] = {}
    for name in chosen:
        wanted.setdefault(_kind(name, apart), []).append(name)
    patterns: list[str] = []
    for kind, names in wanted.items():
        pattern = _pattern(kind, {_layer(name) for name in names} if kind in avoided else None)
        if apart and not kind.startswith(tuple(apart)) and _matches_any(pattern, others):
            pattern = rf"(?!(?:.*\.)?(?:{'|'.join(apart)})\.){pattern}"
        exact = [f"^{re.escape(name)}$" for name in names]
        patterns += exact if _matches_any(pattern, others) else [pattern]
    return [f"re:{pattern}" for pattern in patterns]


def _kind(name: str, apart: Collection[str]) -> str:
    """The name from its space or its layer on, numbers blanked."""
    start = name.removesuffix(".weight").rfind(".") + 1
    layer = _LAYER.search(name)
    if layer:
        start = layer.start() + (name[layer.start()] == ".")
    space = re.match(rf"(?:model\.)?({'|'.join(apart)})\.", name) if apart else None
    if space:
        start = space.start(1)
    return _NUMBER.sub("#", name[start:])


def _layer(name: str) -> int:
    layer = _LAYER.search(name)
    return int(layer.group(1)) if layer else -1


def _pattern(kind: str, layers: set[int] | None) -> str:
    """``layers``: the only ones that may match, None for all."""
    escaped = re.escape(kind).replace(r"\#", "#").replace("#", r"\d+")
    if layers is not None:
        listed = "|".join(str(n) for n in sorted(layers))
        escaped = escaped.replace(r"\d+", f"(?:{listed})", 1)
    return f".*{escaped}$"


def _matches_any(pattern: str, names: Iterable[str]) -> bool:
    match = re.compile(pattern).match
    return any(match(name) for name in names)
