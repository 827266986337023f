"""Ranges of a store that are fetched before they are asked for, in the order of a plan and within a budget of bytes."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from halfbyte.stores.remote import PART_BYTES, STREAMS, RemoteStore

Extent = tuple[str, int, int]
"""A file, and the offset and number of bytes that a conversion reads of it."""


@dataclass(eq=False)
class _Block:
    """One request: ``number`` in the order of reading; ``left``: bytes of it that nobody has taken yet."""

    number: int
    file: str
    offset: int
    size: int
    left: int
    data: Future[bytes] | None = None


class ReadAhead:
    """Reads ranges as a store does, having fetched them already where they come in the announced order.

    At most ``budget`` bytes are on their way or held. What is asked for out of order, or once more, is read directly.
    A context manager: leaving it drops what nobody has asked for.
    """

    def __init__(self, store: RemoteStore, extents: Iterable[Extent], budget: int) -> None:
        self._store, self._budget = store, budget
        self._blocks = _cut(extents)
        by_file: dict[str, list[_Block]] = {}
        for block in self._blocks:
            by_file.setdefault(block.file, []).append(block)
        self._by_file = {file: sorted(blocks, key=lambda b: b.offset) for file, blocks in by_file.items()}
        self._offsets = {file: [block.offset for block in blocks] for file, blocks in self._by_file.items()}
        self._todo = deque(self._blocks)
        self._held: deque[_Block] = deque()
        self._bytes = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(STREAMS, "halfbyte-ahead")
        self._fill()

    def read_into(self, name: str, view: memoryview, offset: int) -> int:
        """Fill ``view`` from ``offset`` with what is held, and read the rest from the store."""
        size = max(0, min(len(view), self._store.files[name].bytes - offset))
        done = 0
        while done < size:
            block = self._block(name, offset + done)
            data = block.data if block else None  # another thread may forget the block meanwhile
            if block is None or data is None:
                stop = size if block is None else min(size, block.offset + block.size - offset)
                if block is None:
                    stop = min(stop, self._next(name, offset + done) - offset)
                self._store.read_into(name, view[done:stop], offset + done)
                if block is not None:
                    self._take(block, stop - done)
            else:
                begin = offset + done - block.offset
                stop = min(size, done + block.size - begin)
                view[done:stop] = memoryview(data.result())[begin : begin + stop - done]
                self._take(block, stop - done)
            done = stop
        return size

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._todo.clear()
            self._held.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _block(self, name: str, offset: int) -> _Block | None:
        """The block that holds a byte of a file."""
        at = bisect_right(self._offsets.get(name, []), offset) - 1
        block = self._by_file[name][at] if at >= 0 else None
        return block if block is not None and offset < block.offset + block.size else None

    def _next(self, name: str, offset: int) -> int:
        """Where the next block of a file begins, behind its end if there is none."""
        offsets = self._offsets.get(name, [])
        at = bisect_right(offsets, offset)
        return offsets[at] if at < len(offsets) else self._store.files[name].bytes

    def _take(self, block: _Block, count: int) -> None:
        """Note that bytes were read; forget the block when that was all, and those that the reading has left behind."""
        with self._lock:
            block.left -= count
            behind = self._budget // PART_BYTES
            while self._held and (self._held[0].left <= 0 or self._held[0].number < block.number - behind):
                old = self._held.popleft()
                old.data = None
                self._bytes -= old.size
            # those already read without having been fetched
            while self._todo and self._todo[0].number < block.number:
                self._todo.popleft()
        self._fill()

    def _fill(self) -> None:
        """Ask for the next blocks, as many as the budget allows."""
        with self._lock:
            while self._todo and (self._bytes + self._todo[0].size <= self._budget or not self._bytes):
                block = self._todo.popleft()
                if block.left < block.size:
                    continue
                block.data = self._pool.submit(self._store.get, block.file, block.offset, block.size)
                self._bytes += block.size
                self._held.append(block)


def _cut(extents: Iterable[Extent]) -> list[_Block]:
    """Blocks of at most ``PART_BYTES``; neighbours in a file share one. What is named twice is fetched once."""
    blocks: list[_Block] = []
    seen: set[tuple[str, int]] = set()
    for file, offset, size in extents:
        if (file, offset) in seen or not size:
            continue
        seen.add((file, offset))
        last = blocks[-1] if blocks else None
        if last and last.file == file and last.offset + last.size == offset and last.size + size <= PART_BYTES:
            last.size += size
            last.left += size
            continue
        for start in range(0, size, PART_BYTES):
            count = min(PART_BYTES, size - start)
            blocks.append(_Block(len(blocks), file, offset + start, count, count))
    return blocks
