"""JSON files of small checkpoints with one value replaced by one of a wrong type: what strangers' files may hold."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]

MISSING = object()
VALUES: dict[str, Any] = {
    "missing": MISSING,
    "null": None,
    "list": [],
    "list of numbers": [1],
    "list of lists": [[1], {}],
    "object": {},
    "objects": {"a": {"b": 1}},
    "text": "a",
    "empty text": "",
    "huge": 10**400,
    "large": 10**15,
    "negative": -1,
    "zero": 0,
    "fraction": 0.5,
    "nan": float("nan"),
    "true": True,
    "deep": DEEP,
    "surrogate": "\ud800",
    "pattern": "re:(",
}


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a document stands; of long lists and objects (vocabularies), only the first ones."""
    if path:
        yield path
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items if len(items) < 60 else items[:2]:
        yield from paths(inner, (*path, key))


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at a place, or without what is there."""
    result = copy.deepcopy(document)
    part = result
    for key in path[:-1]:
        part = part[key]
    if value is MISSING:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return result


def changes(folder: Path) -> Iterator[tuple[Path, tuple[Any, ...], str]]:
    """Every file of JSON, place and kind of value of a checkpoint folder."""
    for file in sorted(folder.glob("*.json")):
        document = json.loads(file.read_bytes())
        for path in paths(document):
            for kind in VALUES:
                yield file, path, kind
