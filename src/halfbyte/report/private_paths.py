"""What is published names no folder of the machine that it was measured on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.report.results_schema import Results

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_PATH = re.compile(r"[/\\\\]|^~|^[A-Za-z]:")
_NAME_PATH = re.compile(r"(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\).*|[\w. -]+([/\\][\w. -]+)+")


def last_part(path: str) -> str:
    """The last part of a path in the spelling of any system."""
    return PurePosixPath(path.replace("\\", "/").rstrip("/")).name or path


def public_command(document: Results) -> str:
    """The command line of a results file, with the last part of each path; hub ids stay whole."""
    # only the hub has revisions
    hub = {row.path for row in document.rows if row.revision and HUB_ID.fullmatch(row.path)}
    try:
        words = shlex.split(document.command)
    except ValueError:
        words = document.command.split()
    return shlex.join(_public(word, hub) for word in words)


def _public(word: str, hub: set[str]) -> str:
    option, equals, value = word.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={_public(value, hub)}"
    return word if word in hub or not _PATH.search(word) else last_part(word)


def without_folders(document: dict[str, Any]) -> dict[str, Any]:
    """A results document whose rows have names without folders, wherever a row is named; others are unchanged."""
    rows = document.get("rows")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, (list, tuple)) else []
    names: dict[str, str] = {}
    for row in rows:
        name = row.get("name")
        if (
            isinstance(name, str)
            and _NAME_PATH.fullmatch(name)
            and not (row.get("revision") and HUB_ID.fullmatch(name))
        ):
            digest = str(row.get("fingerprint") or "")[:8]
            names[name] = f"{last_part(name)} ({digest})" if digest else last_part(name)
    return _renamed(document, names) if names else document


def _renamed(value: Any, names: Mapping[str, str], key: str = "") -> Any:
    """A document with other names in the keys that name rows."""
    if isinstance(value, dict):
        return {k: _renamed(v, names, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_renamed(v, names, key) for v in value]
    named = key in ("name", "a", "b", "source", "kl", "perplexity")
    return names.get(value, value) if named and isinstance(value, str) else value
