from __future__ import annotations

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from halfbyte.checkpoint import ShardWriter, build_header
from halfbyte.checkpoint.stream_hash import hash_path

SIZE = 3 << 20


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
def test_the_hash_does_not_depend_on_the_order_of_writing(tmp_path: Path, order: str) -> None:
    layout = build_header([("a", "U8", (SIZE,)), ("b", "U8", (7,))])
    content = random.Random(0).randbytes(SIZE + 7)
    pieces = [(i, content[i : i + 65_537]) for i in range(0, len(content), 65_537)]
    if order == "backwards":
        pieces.reverse()
    elif order == "shuffled":
        random.Random(1).shuffle(pieces)
    with ShardWriter(tmp_path / "x", layout) as writer, ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(writer.write_at, len(layout.header) + at, piece) for at, piece in pieces]:
            done.result()
        sha256 = writer.commit()
    assert sha256 == hashlib.sha256(layout.header + content).hexdigest() == hash_path(tmp_path / "x")


def test_bytes_that_are_written_twice_count_once(tmp_path: Path) -> None:
    layout = build_header([("a", "U8", (10,))])
    with ShardWriter(tmp_path / "x", layout) as writer:
        writer.write_at(len(layout.header), bytes(10))
        writer.write_at(len(layout.header) + 3, b"abc")
        sha256 = writer.commit()
    assert sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


def test_what_comes_in_order_is_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.checkpoint.stream_hash.read_into", lambda *_: pytest.fail("it was read again"))
    layout = build_header([("a", "U8", (SIZE,))])
    with ShardWriter(tmp_path / "x", layout) as writer:
        for at in range(0, SIZE, 1 << 18):
            writer.write_at(len(layout.header) + at, bytes(1 << 18))
        assert len(writer.commit()) == 64
