from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from halfbyte.stores import read_ahead
from halfbyte.stores.read_ahead import ReadAhead

from .test_remote import Bytes

DATA = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "PART_BYTES", 100)


class Counting(Bytes):
    """Remembers the most bytes that were on their way and not yet taken."""

    def __init__(self) -> None:
        super().__init__({"a": DATA, "b": DATA[::-1]})
        self.asked: list[tuple[str, int, int]] = []
        self.changed = threading.Condition()

    def fetch(self, name: str, offset: int, size: int) -> bytes:
        with self.changed:
            self.asked.append((name, offset, size))
            self.changed.notify_all()
        return super().fetch(name, offset, size)


def read(ahead: ReadAhead, name: str, offset: int, size: int) -> bytes:
    view = memoryview(bytearray(size))
    assert ahead.read_into(name, view, offset) == size
    return bytes(view)


def test_what_comes_in_order_is_fetched_before_it_is_asked_for_and_once() -> None:
    store = Counting()
    with ReadAhead(store, [("a", 10, 950), ("b", 0, 300)], 400) as ahead:
        with store.changed:
            assert store.changed.wait_for(lambda: len(store.asked) == 4, 10)  # the budget, before any read
        got = b"".join(read(ahead, "a", offset, 50) for offset in range(10, 960, 50))
        got += read(ahead, "b", 0, 300)
    assert got == DATA[10:960] + DATA[::-1][:300]
    assert sum(size for _, _, size in store.asked) == 1250 and len(store.asked) == 13


def test_neighbours_share_a_request() -> None:
    store = Counting()
    with ReadAhead(store, [("a", 0, 30), ("a", 30, 30), ("a", 60, 30), ("a", 200, 10)], 1000) as ahead:
        assert read(ahead, "a", 25, 50) == DATA[25:75] and read(ahead, "a", 200, 10) == DATA[200:210]
    assert sorted(store.asked) == [("a", 0, 90), ("a", 200, 10)]


def test_what_is_asked_for_again_or_was_not_announced_is_read_directly() -> None:
    store = Counting()
    with ReadAhead(store, [("a", 100, 200)], 1000) as ahead:
        assert read(ahead, "a", 50, 300) == DATA[50:350]
        assert read(ahead, "a", 100, 200) == DATA[100:300]
        assert read(ahead, "b", 7, 9) == DATA[::-1][7:16]


def test_blocks_that_nobody_takes_do_not_stop_it() -> None:
    store = Counting()
    with ReadAhead(store, [("a", offset, 100) for offset in range(0, 10_000, 100)], 300) as ahead:
        for offset in range(0, 10_000, 200):  # every second block stays
            assert read(ahead, "a", offset, 100) == DATA[offset : offset + 100]
        assert ahead._bytes <= 400
    assert len(store.asked) <= 160


def test_many_threads_get_the_right_bytes() -> None:
    store = Counting()
    places = list(range(0, 10_000, 70))
    with ReadAhead(store, [("a", 0, 10_000)], 500) as ahead, ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda offset: read(ahead, "a", offset, 70), places)
        assert all(part == DATA[offset : offset + 70] for part, offset in zip(parts, places, strict=True))
