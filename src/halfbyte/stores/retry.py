"""Trying again what failed for a moment: which failures pass, and how long to wait."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
ATTEMPTS = 8
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds: the first pause, which doubles, and the longest one, also where a server asks for a longer one."""
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which the same request may succeed."""


class PassingError(Exception):
    """A failure that may pass. ``wait``: seconds that the server asks for, None if it does not say."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


def retrying(call: Callable[[], T]) -> T:
    """Call until it succeeds, at most ``ATTEMPTS`` times; the last PassingError is raised, others end it at once."""
    pause = FIRST_WAIT
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except PassingError as error:
            if attempt == ATTEMPTS - 1:
                raise
            # spread, so that many workers do not come back together
            wait = max(error.wait or 0.0, pause * random.uniform(0.5, 1.0))
            time.sleep(min(wait, LONGEST_WAIT))
            pause *= 2
    raise AssertionError("unreachable")


def asked_wait(text: str | None) -> float | None:
    """The seconds of a ``Retry-After`` header; None for none, or for a date."""
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None
