"""Formats by name: those that were registered, and any of them with a rotation behind its name."""

from __future__ import annotations

import difflib

from halfbyte.errors import FormatError
from halfbyte.formats.format import Format
from halfbyte.formats.rotated_format import rotated
from halfbyte.formats.rotation import ROTATIONS

_FORMATS: dict[str, Format] = {}
_ALIASES: dict[str, str] = {}


def register(fmt: Format, *aliases: str) -> Format:
    """Add a format to the registry under its name and aliases; FormatError where one of them is taken."""
    for name in (fmt.name, *aliases):
        if name in _FORMATS or name in _ALIASES:
            raise FormatError(
                f"the name {name!r} belongs to the format {get_format(name).name} already; choose another"
            )
    _FORMATS[fmt.name] = fmt
    _ALIASES.update(dict.fromkeys(aliases, fmt.name))
    return fmt


def get_format(name: str | Format) -> Format:
    """The format of this name or alias; FormatError names the nearest ones otherwise."""
    if isinstance(name, Format):
        return name
    fmt = _FORMATS.get(_ALIASES.get(name, name)) or _rotated(name)
    if fmt is None:
        near = difflib.get_close_matches(name[:64], [*_FORMATS, *_ALIASES], n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"known formats: {', '.join(_FORMATS)}"
        raise FormatError(f"unknown format {name[:64]!r}: {hint}")
    return fmt


def _rotated(name: str) -> Format | None:
    """A format in rotated space, by the names of both."""
    base, _, rotation = name.rpartition("_")
    known = _FORMATS.get(_ALIASES.get(base, base))
    return rotated(known, rotation) if known and rotation in ROTATIONS else None


def list_formats() -> list[str]:
    """Names of all registered formats."""
    return list(_FORMATS)
