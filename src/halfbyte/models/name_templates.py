"""Name templates: which role a tensor name stands for, decided once per pattern and not once per tensor.

A name is first *normalised*: every dotted component that is a number becomes `#`. A checkpoint with 200,000
tensors has a few dozen normalised names, so templates are matched only against those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# as engines write them: ASCII, without leading zeros, and no longer than a machine's integer
_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,17})(?![^.])")
_TOKEN = re.compile(r"\{layer\}|\{expert\}|\{n\}|\*")
_REGEX = {"{layer}": "(?P<layer>#)", "{expert}": "(?P<expert>#)", "{n}": "#", "*": ".*"}


def split_numbers(name: str) -> list[str]:
    """Text and numeric components in turn: `a.12.b` -> `["a.", "12", ".b"]`; odd entries are the numbers."""
    return _NUMBER.split(name)


def normalise(name: str) -> str:
    """The name with every numeric component replaced by `#`: `layers.12.mlp.w1` -> `layers.#.mlp.w1`."""
    return _NUMBER.sub("#", name)


@dataclass(frozen=True, slots=True)
class Match:
    """A template's value, and which number of the name (0 = first) is the layer and which the expert."""

    value: str
    layer: int | None
    expert: int | None


class Templates:
    """An ordered mapping from name templates to values; the first that fits the whole name wins.

    In a template `{layer}`, `{expert}` and `{n}` each stand for a numeric component, `*` for any text; the
    rest is literal. Without `{layer}`, the first number of the name is taken as the layer.
    """

    def __init__(self, entries: Iterable[tuple[str, str]]) -> None:
        self._entries: list[tuple[re.Pattern[str], str]] = []
        for template, value in entries:
            self._entries.append((re.compile(_to_regex(template)), value))

    def find(self, normalised: str) -> Match | None:
        """The first entry whose template fits `normalised` entirely, or None."""
        for regex, value in self._entries:
            match = regex.fullmatch(normalised)
            if match:
                groups = match.re.groupindex
                layer = _slot(match, "layer") if "layer" in groups else None
                if layer is None and "#" in normalised:
                    layer = 0
                return Match(value, layer, _slot(match, "expert") if "expert" in groups else None)
        return None


def merge(child: Mapping[str, str], parent: Mapping[str, str]) -> dict[str, str]:
    """The child's entries first, so that they win, then the parent's that it does not replace."""
    return {**child, **{key: value for key, value in parent.items() if key not in child}}


def _to_regex(template: str) -> str:
    parts, position = [], 0
    for token in _TOKEN.finditer(template):
        parts += [re.escape(template[position : token.start()]), _REGEX[token.group()]]
        position = token.end()
    return "".join(parts) + re.escape(template[position:])


def _slot(match: re.Match[str], group: str) -> int | None:
    start = match.start(group)
    return None if start < 0 else match.string.count("#", 0, start)
