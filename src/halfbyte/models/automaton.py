"""Regular expressions in linear time: Python's own syntax and meaning, without its backtracking.

Python parses an expression; here it becomes a nondeterministic automaton, whose sets of states are the states of a
deterministic one that is built while texts are read (Thompson 1968; Cox, https://swtch.com/~rsc/regexp). No text
costs more than a constant for each of its characters. What no automaton can do (references to groups, looking
behind, atomic groups) is refused.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# the parser that `re` itself uses
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

MAX_LENGTH = 20_000
"""Characters of an expression."""
MAX_NODES = 20_000
"""Nodes of an expression after its repetitions have been written out."""
MAX_TOTAL = 200_000
"""Nodes of all expressions together."""
MAX_STATES = 20_000
"""States that are kept; more are forgotten and built again."""
_FREE_VISITS, _VISITS_PER_CHARACTER = 3_000_000, 64

_END, _LAST_NEWLINE = "", "\n\n"  # symbols beside the single characters
_START, _WORD, _OTHER = range(3)  # what stands before a position
_FLAGS = re.UNICODE | re.IGNORECASE | re.ASCII | re.DOTALL | re.VERBOSE


class Unsupported(ValueError):  # noqa: N818
    """An expression is not valid, too large, or asks for what takes more than linear time."""


class Slow(ValueError):  # noqa: N818
    """An expression needs more work than the texts that it is matched with can pay for."""


class _Node(NamedTuple):
    """One node: ``test`` consumes a character, ``condition`` looks around, else it only leads on.

    A node without successors accepts.
    """

    after: tuple[int, ...]
    test: Callable[[str], Any] | None = None
    condition: str = ""
    ahead: Automaton | None = None


class _State:
    """A set of nodes, before what follows them without a character; ``steps``: symbol -> next state."""

    __slots__ = ("before", "nodes", "steps")

    def __init__(self, nodes: frozenset[int], before: int) -> None:
        self.nodes, self.before = nodes, before
        self.steps: dict[str, _State | bool] = {}


class Automaton:
    """Whether a text begins with what any of some parsed expressions describes."""

    def __init__(self, anywhere: bool = False) -> None:
        self._nodes: list[_Node] = [_Node(())]  # the first one accepts
        self._tests: dict[tuple[str, int], Callable[[str], Any]] = {}
        self._looks = False  # transitions depend on more than the next character
        self._bounds = False
        self._starts: set[int] = set()
        self._anywhere = anywhere
        self._states: dict[tuple[frozenset[int], int], _State] = {}
        self._prefixes: dict[str, _State | bool] = {}
        self._visits, self._characters = 0, 0

    def add(self, tree: Sequence[Any], flags: int, limit: int = MAX_NODES) -> Automaton:
        """Add an expression of at most ``limit`` nodes, parsed; Unsupported leaves the automaton as it was."""
        size = len(self._nodes)
        limit = min(size + limit, MAX_TOTAL)
        try:
            start = self._sequence(tree, 0, flags, limit)
            if self._anywhere:
                loop = self._add(_Node(()), limit)
                self._nodes[loop] = _Node((start, self._add(_Node((loop,), _any), limit)))
                start = loop
        except (Unsupported, RecursionError):
            del self._nodes[size:]
            raise
        self._starts.add(start)
        self._states.clear()
        self._prefixes.clear()
        return self

    def accepts(self, text: str, start: int = 0) -> bool:
        """Whether a match begins at ``start``. Slow if that takes too much work."""
        before = _START if start == 0 else self._kind(text[start - 1])
        state: _State | bool = self._state(frozenset(self._starts), before)
        self._characters += len(text) - start + 1
        if start == 0 and not self._looks:
            # names share beginnings: those of one layer, those of one expert
            inner = text.rfind(".", 0, max(text.rfind("."), 0)) + 1
            for cut in (text.rfind(".", 0, max(inner - 1, 0)) + 1, inner):
                known = self._prefixes.get(text[:cut])
                if known is None:
                    known = self._prefixes[text[:cut]] = self._walk(state, text, start, cut)
                state, start = known, cut
            if len(self._prefixes) > MAX_STATES:
                self._prefixes.clear()
        state = self._walk(state, text, start, len(text))
        if isinstance(state, bool):
            return state
        result = state.steps.get(_END)
        return (self._step(state, _END, text, len(text)) if result is None else result) is True

    def _walk(self, state: _State | bool, text: str, start: int, stop: int) -> _State | bool:
        """The state after characters ``start`` to ``stop``; True or False where it is clear before."""
        last = len(text) - 1
        for i in range(start, stop):
            if state is True or state is False:
                return state
            symbol = text[i]
            if symbol == "\n" and i == last:
                symbol = _LAST_NEWLINE
            following = state.steps.get(symbol)
            state = self._step(state, symbol, text, i) if following is None else following
        return state

    def _state(self, nodes: frozenset[int], before: int) -> _State:
        if len(self._states) > MAX_STATES:
            self._states.clear()
        state = self._states.get((nodes, before))
        if state is None:
            state = self._states[nodes, before] = _State(nodes, before)
        return state

    def _step(self, state: _State, symbol: str, text: str, position: int) -> _State | bool:
        """The state after a symbol; True where a match is complete, False where none can come."""
        character = symbol[:1]
        following: set[int] = set()
        seen = set(state.nodes)
        stack = list(seen)
        result: _State | bool | None = None
        while stack:
            number = stack.pop()
            self._visits += 1
            node = self._nodes[number]
            if not number:
                result = True
                break
            if node.test is not None:
                if character and node.test(character):
                    following.update(node.after)
            elif not node.condition or self._holds(node, state.before, symbol, text, position):
                fresh = [n for n in node.after if n not in seen]
                seen.update(fresh)
                stack += fresh
        if self._visits > _FREE_VISITS + _VISITS_PER_CHARACTER * self._characters:
            raise Slow("it takes too much work")
        if result is None:
            done = not following or not character
            result = False if done else self._state(frozenset(following), self._kind(character))
        if not self._looks:
            state.steps[symbol] = result
        return result

    def _holds(self, node: _Node, before: int, symbol: str, text: str, position: int) -> bool:
        if node.ahead is not None:
            return node.ahead.accepts(text, position) == (node.condition == "ahead")
        if node.condition in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return before == _START
        if node.condition == "AT_END":
            return symbol in (_END, _LAST_NEWLINE)
        if node.condition == "AT_END_STRING":
            return symbol == _END
        boundary = (before == _WORD) != (bool(symbol) and bool(_is_word(symbol[0])))
        return boundary == (node.condition == "AT_BOUNDARY")

    def _kind(self, character: str) -> int:
        return _WORD if self._bounds and _is_word(character) else _OTHER

    def _add(self, node: _Node, limit: int) -> int:
        if len(self._nodes) >= limit:
            raise Unsupported("it is too large")
        self._nodes.append(node)
        return len(self._nodes) - 1

    def _sequence(self, tree: Sequence[Any], after: int, flags: int, limit: int) -> int:
        """The first node of a sequence that leads on to ``after``; built from its end."""
        for operation, argument in reversed(list(tree)):
            after = self._item(str(operation), argument, after, flags, limit)
        return after

    def _item(self, operation: str, argument: Any, after: int, flags: int, limit: int) -> int:
        if operation in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return self._add(_Node((after,), self._test(operation, argument, flags)), limit)
        if operation == "BRANCH":
            branches = [self._sequence(branch, after, flags, limit) for branch in argument[1]]
            return self._add(_Node(tuple(branches)), limit)
        if operation == "SUBPATTERN":
            _, more, less, inner = argument
            return self._sequence(inner, after, _checked((flags | more) & ~less), limit)
        if operation in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = argument
            return self._repeat(int(least), int(most), inner, after, flags, limit)
        if operation == "AT":
            self._bounds |= "BOUNDARY" in str(argument)
            if flags & re.ASCII and "BOUNDARY" in str(argument):
                raise Unsupported("word boundaries go with the flag a in no automaton here")
            return self._add(_Node((after,), condition=str(argument)), limit)
        if operation in ("ASSERT", "ASSERT_NOT") and argument[0] == 1:
            self._looks = True
            ahead = Automaton().add(argument[1], flags)
            condition = "ahead" if operation == "ASSERT" else "not ahead"
            return self._add(_Node((after,), condition=condition, ahead=ahead), limit)
        if operation == "FAILURE":
            return self._add(_Node((after,), lambda c: False), limit)
        what = {
            "ASSERT": "looks behind",
            "ASSERT_NOT": "looks behind",
            "GROUPREF": "refers to a group",
            "GROUPREF_EXISTS": "refers to a group",
        }.get(operation, "never gives back what it has matched")
        raise Unsupported(f"it {what}, which takes more than linear time")

    def _repeat(self, least: int, most: int, inner: Any, after: int, flags: int, limit: int) -> int:
        if most >= int(_parser.MAXREPEAT):
            loop = self._add(_Node(()), limit)
            self._nodes[loop] = _Node((self._sequence(inner, loop, flags, limit), after))
            after = loop
        else:
            end = after
            for _ in range(most - least):
                after = self._add(_Node((self._sequence(inner, after, flags, limit), end)), limit)
        for _ in range(least):
            first = self._sequence(inner, after, flags, limit)
            if first == after:  # of nothing, which could be counted without end
                break
            after = first
        return after

    def _test(self, operation: str, argument: Any, flags: int) -> Callable[[str], Any]:
        """What Python thinks of one character."""
        if operation == "LITERAL" and not flags & re.IGNORECASE:
            return chr(argument).__eq__
        if operation == "ANY":
            text = "."
        elif operation == "LITERAL":
            text = _spelled(argument)
        elif operation == "NOT_LITERAL":
            text = f"[^{_spelled(argument)}]"
        else:
            text = f"[{''.join(_set_item(str(kind), value) for kind, value in argument)}]"
        key = text, flags & (re.IGNORECASE | re.ASCII | re.DOTALL)
        if key not in self._tests:
            self._tests[key] = re.compile(*key).fullmatch
        return self._tests[key]


def parse(expression: str) -> tuple[list[Any], int]:
    """An expression as Python's parser understands it: (operation, argument) in turn, and flags. Unsupported else."""
    if len(expression) > MAX_LENGTH:
        raise Unsupported(f"it has more than {MAX_LENGTH} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what may mean something else in a future Python
            tree = _parser.parse(expression)
    except (re.error, OverflowError) as error:
        raise Unsupported(str(error)) from None
    except RecursionError:
        raise Unsupported("it is nested too deeply") from None
    return list(tree), _checked(int(tree.state.flags))


def _any(character: str) -> bool:
    return True


def _checked(flags: int) -> int:
    if flags & ~int(_FLAGS):
        raise Unsupported("it has flags that are not supported (m, L)")
    return flags


def _spelled(code: int) -> str:
    return f"\\U{code:08x}"


def _set_item(kind: str, value: Any) -> str:
    if kind == "NEGATE":
        return "^"
    if kind == "RANGE":
        return f"{_spelled(value[0])}-{_spelled(value[1])}"
    if kind == "CATEGORY":
        name = str(value)
        letter = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}[name.rpartition("_")[2]]
        return "\\" + (letter.upper() if "_NOT_" in name else letter)
    return _spelled(value)


_is_word: Callable[[str], Any] = re.compile(r"\w").match
