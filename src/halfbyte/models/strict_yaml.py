"""YAML without its trap: a key that is written twice is an error instead of a silent loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

#: More than any recipe or family needs; beyond it the parser itself may overflow its stack.
MAX_DEPTH = 50
MAX_LENGTH = 10_000_000
_LONGEST_NUMBER = 100


class _StrictLoader(_Base):  # type: ignore[misc]
    """The safe loader; plain data only."""


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str | int | float | bool | None):
            raise ValueError(f"line {line}: a key must be plain text")
        if key in seen:
            raise ValueError(f"line {line}: the key {key!r} is already given in line {seen[key]}")
        seen[key] = line
    loader.flatten_mapping(node)
    result: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    return result


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_yaml(text: str) -> Any:
    """Parse one YAML document of plain data.

    Raises `ValueError` with the line for a syntax error, an unsafe tag or a key that is given twice.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"it has more than {MAX_LENGTH} characters")
    with _sentences():
        _check_events(text)
        return yaml.load(text, Loader=_StrictLoader)


def check_yaml(text: str) -> None:
    """Raise `ValueError` for YAML that is no YAML, has tags, is nested deeply or stands for an endless value."""
    with _sentences():
        _check_events(text)


@contextmanager
def _sentences() -> Iterator[None]:
    try:
        yield
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem or error.context or 'not valid YAML'}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (RecursionError, MemoryError):
        raise ValueError("it is nested too deeply") from None
    except (KeyError, TypeError, AttributeError, OverflowError) as error:  # constructors of tags check little
        raise ValueError(f"a value does not fit its tag ({type(error).__name__}: {error})") from None


def _check_events(text: str) -> None:
    """Look through the document's events, which need no recursion, before anything is composed of them."""
    depth, anchored = 0, 0  # the depth at which an anchor's collection begins
    for event in yaml.parse(text, Loader=_StrictLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1 if event.start_mark else 1
        if depth > MAX_DEPTH:
            raise ValueError(f"line {line}: it is nested more than {MAX_DEPTH} levels deep")
        if depth < anchored:
            anchored = 0
        # such documents stand for endless or exponentially large values
        if isinstance(event, yaml.AliasEvent) and anchored:
            raise ValueError(f"line {line}: an alias stands inside of what an anchor names")
        if isinstance(event, yaml.CollectionStartEvent) and event.anchor and not anchored:
            anchored = depth
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
            _check_plain(event.value, line)
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", "tag:yaml.org,2002:str"):
            raise ValueError(f"line {line}: the tag {tag[:60]} is not used here; write the value without one")


def _check_plain(value: str, line: int) -> None:
    """Refuse merge keys, which copy, and numbers of any length, since those to the base 60 take the square of it."""
    if value == "<<":
        raise ValueError(f"line {line}: merge keys (<<) are not used here; write the keys out")
    if len(value) > _LONGEST_NUMBER and not value.strip("+-.:_0123456789abcdefABCDEFx"):
        raise ValueError(f"line {line}: a number of more than {_LONGEST_NUMBER} digits")
