"""Bounds on time that hold on a machine that does other things too."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(cpu_seconds: float, call: Callable[[], T]) -> T:
    """What ``call`` returns; fails where none of three calls takes less time of this process's own."""
    taken = []
    for _ in range(3):
        began = time.process_time()
        result = call()
        taken.append(time.process_time() - began)
        if taken[-1] < cpu_seconds:
            return result
    raise AssertionError(f"three calls took {', '.join(f'{t:.2f}' for t in taken)} s, each more than {cpu_seconds} s")
