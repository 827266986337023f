from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from halfbyte.checkpoint import files
from halfbyte.errors import CheckpointError


def test_reads_larger_than_one_system_call_are_put_together(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    monkeypatch.setattr(files, "_LARGEST_READ", 7)
    descriptor, size = files.open_regular(path)
    buffer = bytearray(90)
    assert files.read_into(descriptor, memoryview(buffer), 5) == 90
    os.close(descriptor)
    assert (bytes(buffer), size) == (bytes(range(5, 95)), 100)


def test_reads_work_where_preadv_is_missing(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abcdef")
    monkeypatch.delattr(os, "preadv")
    descriptor, _ = files.open_regular(path)
    buffer = bytearray(9)
    assert files.read_into(descriptor, memoryview(buffer), 2) == 4
    os.close(descriptor)
    assert bytes(buffer[:4]) == b"cdef"


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        files.open_regular(tmp_path / "pipe")


def test_configs_may_hold_infinity_but_headers_may_not() -> None:
    assert files.parse_object(b'{"limit": Infinity}', "config.json", strict=False)["limit"] == float("inf")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        files.parse_object(b'{"limit": Infinity}', "x")


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with files.collector_paused():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
