from __future__ import annotations

import os
from pathlib import Path

import pytest

from halfbyte.checkpoint.files import forget_pages, is_cached

SIZE = 4 << 20


@pytest.fixture
def descriptor(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    found = os.open(path, os.O_RDWR)
    os.fsync(found)
    yield found
    os.close(found)


def test_a_file_that_was_just_written_is_cached(descriptor: int) -> None:
    assert is_cached(descriptor, SIZE)


def test_an_empty_file_counts_as_cached(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    found = os.open(tmp_path / "empty", os.O_RDONLY)
    assert is_cached(found, 0)
    os.close(found)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux tells what is cached")
def test_forgotten_pages_are_not_cached_but_stay_what_they_are(descriptor: int) -> None:
    before = os.pread(descriptor, SIZE, 0)
    forget_pages(descriptor, 0, SIZE)
    if is_cached(descriptor, SIZE):
        pytest.skip("this file system keeps its pages")
    assert os.pread(descriptor, SIZE, 0) == before


def test_where_the_system_cannot_say_a_file_counts_as_cached(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "preadv", unsupported, raising=False)
    assert is_cached(descriptor, SIZE)
