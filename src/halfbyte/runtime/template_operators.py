"""Operators of chat templates with bounds: one step of Python must not take all time or memory.

A time limit acts between two steps, and ``10 ** (10 ** 9)`` or ``"a" * 10 ** 10`` is one.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MEMORY = 1 << 30
"""Bytes that a template may add to the process; texts of conversations have some MB."""
_LENGTH, _BITS = 10_000_000, 10_000
_WIDE = re.compile(r"%[^a-zA-Z%]*(?:\d{6}|\*)")


def _bounded(name: str, result: Callable[[Any, Any], Any], allowed: Callable[[Any, Any], bool]) -> Any:
    def apply(left: Any, right: Any) -> Any:
        from jinja2.exceptions import SecurityError

        if not allowed(left, right):
            raise SecurityError(f"the chat template computes something very large with {name}")
        return result(left, right)

    return apply


def _size(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else len(value) if hasattr(value, "__len__") else 1


def _product(left: Any, right: Any) -> bool:
    if hasattr(left, "__len__") or hasattr(right, "__len__"):
        many, count = (left, right) if hasattr(left, "__len__") else (right, left)
        return not isinstance(count, int) or len(many) * max(count, 0) <= _LENGTH
    return _size(left) + _size(right) <= _BITS


def _power(left: Any, right: Any) -> bool:
    return not isinstance(left, int) or not isinstance(right, int) or _size(left) * abs(right) <= _BITS


def _remainder(left: Any, right: Any) -> bool:
    return not isinstance(left, str) or not _WIDE.search(left)


_OPERATORS = {
    "*": _bounded("*", operator.mul, _product),
    "**": _bounded("**", operator.pow, _power),
    "%": _bounded("%", operator.mod, _remainder),
}


@contextmanager
def bounded_operators() -> Iterator[None]:
    """Let jinja2's sandbox use these operators in templates that are compiled and applied within this context."""
    try:
        from jinja2.sandbox import SandboxedEnvironment
    except ImportError:  # no template can be applied then
        yield
        return
    intercepted, table = SandboxedEnvironment.intercepted_binops, SandboxedEnvironment.default_binop_table
    SandboxedEnvironment.intercepted_binops = frozenset({*intercepted, *_OPERATORS})
    SandboxedEnvironment.default_binop_table = {**table, **_OPERATORS}
    try:
        yield
    finally:
        SandboxedEnvironment.intercepted_binops = intercepted
        SandboxedEnvironment.default_binop_table = table


@contextmanager
def bounded_memory(more: int = MEMORY) -> Iterator[None]:
    """MemoryError where the process grows by ``more`` bytes within this context; Linux alone can do that."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + more
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
