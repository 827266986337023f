"""Compact, unanchored module patterns: what engines match layer names against.

Loaders rename prefixes (``model.language_model.`` becomes ``language_model.model.``) but not regular
expressions, so a pattern starts at ``layers.`` and leaves what stands before it open.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"\d+")
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")


def compact(chosen: Iterable[str], others: Iterable[str] = (), end: str = "$") -> list[str]:
    """``re:`` patterns that match all ``chosen`` module names and, by their layers, none of ``others``.

    A kind of module that is chosen in every layer gets one pattern with ``\\d+``; otherwise its layers are
    listed.
    """
    avoided: dict[str, set[int]] = {}
    for name in others:
        avoided.setdefault(_kind(name), set()).add(_layer(name))
    wanted: dict[str, set[int]] = {}
    for name in chosen:
        wanted.setdefault(_kind(name), set()).add(_layer(name))
    return [f"re:{_pattern(kind, layers, bool(avoided.get(kind)))}{end}" for kind, layers in wanted.items()]


def _kind(name: str) -> str:
    """The name from its layer on, numbers blanked; multi-token prediction and vision keep their prefix."""
    found = _LAYER.search(name)
    start = 0
    if found and not name.startswith("mtp.") and "visual" not in name[: found.start()]:
        start = found.start() + (name[found.start()] == ".")
    elif not name.startswith("mtp."):
        start = 0 if "visual" in name or "vision" in name else name.rfind(".") + 1
    return _NUMBER.sub("#", name[start:])


def _layer(name: str) -> int:
    found = _LAYER.search(name)
    return int(found.group(1)) if found else -1


def _pattern(kind: str, layers: set[int], partial: bool) -> str:
    head = "^" if kind.startswith("mtp.") else ".*"
    escaped = re.escape(kind).replace(r"\#", "#").replace("#", r"\d+")
    if partial:
        listed = "|".join(str(n) for n in sorted(layers))
        escaped = escaped.replace(r"\d+", f"(?:{listed})", 1)
    return head + escaped
