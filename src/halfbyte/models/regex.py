"""Lists of names and of `re:` expressions, as recipes and configurations give them, matched in linear time.

Engines match with Python's `re`, which a stranger's expression can keep busy for ever; see `automaton`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from halfbyte.errors import CheckpointError
from halfbyte.models.automaton import Automaton, Slow, Unsupported, parse

REGEX = "re:"
MAX_EXPRESSIONS = 50_000
# counted repetitions are written out, but not without end
_NODES, _NODES_PER_CHARACTER = 2_000, 50


class Patterns:
    """Whether a name is in a list or is matched, from its beginning, by one of the list's expressions.

    ``what`` names the list in the CheckpointError for an expression that is not valid or not supported; ``exact``
    are the names. ``anywhere``: expressions may match in the middle of a name, too.
    """

    def __init__(self, entries: Iterable[str], what: str, anywhere: bool = False) -> None:
        self.what = what
        expressions = []
        exact = set()
        for entry in entries:
            if entry.startswith(REGEX):
                expressions.append(entry[len(REGEX) :])
            else:
                exact.add(entry)
        self.exact = frozenset(exact)
        if len(expressions) > MAX_EXPRESSIONS:
            raise CheckpointError(f"{what} hold more than {MAX_EXPRESSIONS} regular expressions")
        whole: set[str] = set()
        # by what they look ahead for at the beginning, so that all others share one walk over a name
        parts: dict[str, tuple[list[tuple[bool, Automaton]], Automaton]] = {}
        for expression in expressions:
            try:
                tree, flags = parse(expression)
                text = _literal(tree)
                guards, rest = _split(tree, anywhere)
                if text is not None:
                    whole |= {text, f"{text}\n"}
                else:
                    key = f"{guards} {flags}" if guards else ""
                    if key not in parts:
                        looks = [(str(kind) == "ASSERT", Automaton().add(part, flags)) for kind, (_, part) in guards]
                        parts[key] = looks, Automaton(anywhere and not guards)
                    parts[key][1].add(rest, flags, _NODES + _NODES_PER_CHARACTER * len(expression))
            except (Unsupported, RecursionError) as error:
                why = "it is nested too deeply" if isinstance(error, RecursionError) else error
                raise CheckpointError(f"{what}: {_short(expression)} cannot be used: {why}") from None
        self._whole = frozenset(whole)
        self._parts = list(parts.values())

    def match(self, name: str) -> bool:
        """Whether the list holds a name; CheckpointError where that takes too much work."""
        if name in self.exact or name in self._whole:
            return True
        try:
            return any(
                all(guard.accepts(name) == wanted for wanted, guard in guards) and body.accepts(name)
                for guards, body in self._parts
            )
        except (Slow, RecursionError):
            raise CheckpointError(f"{self.what} hold an expression that takes too much work to match") from None


def check_expression(expression: str) -> str | None:
    """Why an expression (without `re:`) cannot be used, or None."""
    try:
        Patterns([REGEX + expression], "the list", anywhere=True)
    except CheckpointError as error:
        return str(error).partition(" cannot be used: ")[2]
    return None


def _literal(tree: list[Any]) -> str | None:
    """Return the text of a pattern `^text$`, None for other patterns."""
    if len(tree) < 2 or [(str(o), str(a)) for o, a in (tree[0], tree[-1])] != [
        ("AT", "AT_BEGINNING"),
        ("AT", "AT_END"),
    ]:
        return None
    inner = tree[1:-1]
    return "".join(chr(code) for _, code in inner) if all(str(o) == "LITERAL" for o, _ in inner) else None


def _split(tree: list[Any], anywhere: bool) -> tuple[list[Any], list[Any]]:
    """What an expression that can only match at the beginning looks ahead for first, and the rest."""
    start = 0
    while start < len(tree) and (str(tree[start][0]), str(tree[start][1])) == ("AT", "AT_BEGINNING"):
        start += 1
    if anywhere and not start:
        return [], tree
    stop = start
    while stop < len(tree) and str(tree[stop][0]) in ("ASSERT", "ASSERT_NOT") and tree[stop][1][0] == 1:
        stop += 1
    return tree[start:stop], tree[:start] + tree[stop:]


def _short(expression: str) -> str:
    return repr(expression) if len(expression) < 100 else f"{expression[:100]!r}..."
