"""What bounds a request: bytes, seconds, and places among those that run or wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Largest body in bytes, seconds to receive it and to answer, requests that run and that wait at once."""

    body: int = 32 * 2**20
    body_seconds: float = 30.0
    seconds: float = 600.0
    concurrent: int = 64
    queue: int = 256


class Full(Exception):  # noqa: N818
    """All places are taken, and so is the queue."""


class Gate:
    """Lets ``concurrent`` requests run and ``queue`` more wait; further ones are turned away with Full."""

    def __init__(self, concurrent: int, queue: int) -> None:
        self._places = asyncio.Semaphore(concurrent)
        self._queue = queue
        self.running = 0
        self.waiting = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place and hold it; cancellation gives it up."""
        if self._places.locked() and self.waiting >= self._queue:
            raise Full
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()
