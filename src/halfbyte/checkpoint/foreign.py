"""JSON that somebody else wrote, read by type: every value of a wrong type is one sentence.

Nothing in such a file is known before it is looked at. Readers ask a :class:`Fields` for a value of the type
that they need and get that, the default where there is none (null counts as none), or a CheckpointError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from halfbyte.errors import CheckpointError

#: Deeper nesting than any real file has; writing and copying such values would end in a RecursionError.
MAX_DEPTH = 64
#: Counts beyond this are no counts of anything that fits a file.
MAX_COUNT = 10**12

_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


class Fields:
    """The values of a JSON object by type. ``file`` and ``path`` say in messages where it stands."""

    __slots__ = ("file", "path", "values")

    def __init__(self, value: Any, file: str, path: str = "") -> None:
        if value is not None and not isinstance(value, Mapping):
            raise wrong_type(path or "the outermost value", file, "an object", value)
        self.values: Mapping[str, Any] = value or {}
        self.file, self.path = file, path

    def __bool__(self) -> bool:
        return bool(self.values)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def fields(self, key: str) -> Fields:
        """An object; without values where there is none."""
        return Fields(self.values.get(key), self.file, self._place(key))

    def members(self) -> Iterator[tuple[str, Fields]]:
        """Every key with its value, which must be an object."""
        for key in self.values:
            yield key, self.fields(key)

    def text(self, key: str, default: str = "") -> str:
        """Return a text, or the default where there is none."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "text")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a truth value, or the default where there is none."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def count(self, key: str, default: int | None = None, least: int = 0, most: int = MAX_COUNT) -> int | None:
        """An integer from ``least`` to ``most``."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        """Return a finite number, or the default where there is none."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise self.wrong(key, "a finite number")
        return float(value)

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty where there is none."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of texts")
        return list(value)

    def objects(self, key: str) -> list[Fields]:
        """A list of objects; empty where there is none."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(key, "a list of objects")
        return [Fields(item, self.file, f"{self._place(key)}[{i}]") for i, item in enumerate(value)]

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """The error for a value that is not what is expected."""
        return wrong_type(self._place(key), self.file, expected, self.values.get(key))

    def _place(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else str(key)


def wrong_type(place: str, file: str, expected: str, value: Any) -> CheckpointError:
    """The error for a value of a wrong type; says only the type of what may be large."""
    kind = "null" if value is None else _NAMES.get(type(value), type(value).__name__)
    shown = f" {value!r}" if isinstance(value, bool | float) else ""
    if isinstance(value, str):
        shown = f" {value[:40]!r}"
    elif type(value) is int:
        shown = f" {value}" if abs(value) < 10**20 else " of more than 20 digits"
    return CheckpointError(f"{place[:200]} in {file} must be {expected}, not {kind}{shown}")


def check_plain(value: Any, file: str) -> None:
    """Refuse a JSON value that could not be written again: nested too deeply, or with unpaired surrogates."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{file} is nested more than {MAX_DEPTH} levels deep")
        texts: list[str] = []
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                texts += item
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                texts.append(item)
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"{file} holds text with an unpaired surrogate") from None
        level, depth = [item for item in inner if isinstance(item, dict | list | str)], depth + 1


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
