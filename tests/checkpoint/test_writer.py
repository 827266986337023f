from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from halfbyte.checkpoint import Layout, ShardWriter, build_header, copy_file_atomic, write_file_atomic, writer
from halfbyte.errors import CheckpointError, OutputError

LAYOUT = build_header([("a", "U8", (4,)), ("b", "U8", (4,))])
A, B = LAYOUT.offsets


def no_space(*_args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_committed_file_is_exactly_header_and_data(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x.safetensors", LAYOUT) as w:
        w.write_at(B, b"5678")
        w.write_at(A, bytearray(b"1234"))
        w.commit()
    assert (tmp_path / "x.safetensors").read_bytes() == LAYOUT.header + b"12345678"
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_final_name_appears_only_at_commit(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", LAYOUT) as w:
        w.write_at(A, bytes(8))
        assert [p.name for p in tmp_path.iterdir()] == ["x.partial"]
        assert (tmp_path / "x.partial").stat().st_size == LAYOUT.total
        w.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_the_space_is_reserved_at_once(tmp_path: Path) -> None:
    layout = build_header([("a", "U8", (1 << 20,))])
    with ShardWriter(tmp_path / "x", layout):
        assert (tmp_path / "x.partial").stat().st_blocks * 512 >= 1 << 20


@pytest.mark.parametrize("finish", ["abort", "exception", "forgotten"])
def test_without_a_commit_nothing_is_left(tmp_path: Path, finish: str) -> None:
    try:
        with ShardWriter(tmp_path / "x", LAYOUT) as w:
            w.write_at(A, bytes(8))
            if finish == "abort":
                w.abort()
            if finish == "exception":
                raise KeyError
    except KeyError:
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_an_earlier_run_stays_until_commit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with ShardWriter(tmp_path / "x", LAYOUT):
        pass
    assert (tmp_path / "x").read_bytes() == b"old"


def test_the_remains_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "x.partial").symlink_to("victim")
    with ShardWriter(tmp_path / "x", LAYOUT) as w:
        w.write_at(A, bytes(8))
        w.commit()
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "x").is_symlink()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(8, dtype=np.uint8),
        np.arange(4, dtype=np.float32).astype(ml_dtypes.bfloat16),
        np.arange(16, dtype=np.uint8).reshape(8, 2)[:, 0],
        np.asfortranarray(np.arange(8, dtype=np.uint8).reshape(2, 4)),
        np.array(3.5, np.float64),
        np.ones(8, ml_dtypes.float8_e8m0fnu),
    ],
    ids=["u8", "bf16", "strided", "fortran", "scalar", "e8m0"],
)
def test_arrays_are_written_in_row_order(tmp_path: Path, array: np.ndarray) -> None:
    with ShardWriter(tmp_path / "x", LAYOUT) as w:
        w.write_at(A, array)
        w.commit()
    assert (tmp_path / "x").read_bytes()[A:] == array.tobytes()


@pytest.mark.parametrize(("offset", "count"), [(0, 1), (A - 1, 1), (A, 9), (LAYOUT.total, 1)])
def test_writes_outside_of_the_data_are_refused(tmp_path: Path, offset: int, count: int) -> None:
    with ShardWriter(tmp_path / "x", LAYOUT) as w, pytest.raises(OutputError, match="outside the data"):
        w.write_at(offset, bytes(count))


def test_a_file_with_unwritten_bytes_is_not_committed(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", LAYOUT) as w:
        w.write_at(A, b"123")
        w.write_at(B, b"5678")
        with pytest.raises(OutputError, match=f"byte {A + 3} of .* was never written"):
            w.commit()
    assert list(tmp_path.iterdir()) == []


def test_overlapping_writes_may_complete_a_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", LAYOUT) as w:
        w.write_at(A, bytes(8))
        w.write_at(A + 1, b"1")
        w.commit()
    assert (tmp_path / "x").read_bytes()[A:] == b"\x001" + bytes(6)


def test_a_committed_file_takes_no_more_writes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", LAYOUT) as w:
        w.write_at(A, bytes(8))
        w.commit()
        with pytest.raises(OutputError, match="closed"):
            w.write_at(A, b"1")


def test_threads_write_one_file(tmp_path: Path) -> None:
    layout = build_header([(str(i), "U8", (100,)) for i in range(50)])
    with ShardWriter(tmp_path / "x", layout) as w, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: w.write_at(layout.offsets[i], bytes([i]) * 100), range(50)))
        w.commit()
    assert (tmp_path / "x").read_bytes()[len(layout.header) :] == b"".join(bytes([i]) * 100 for i in range(50))


def test_large_writes_are_split(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(writer, "_LARGEST_WRITE", 3)
    with ShardWriter(tmp_path / "x", LAYOUT) as w:
        w.write_at(A, b"12345678")
        w.commit()
    assert (tmp_path / "x").read_bytes()[A:] == b"12345678"


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(OutputError, match="no room"):
        ShardWriter(tmp_path / "x", LAYOUT)
    assert list(tmp_path.iterdir()) == []


def test_more_than_any_disk_holds_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        ShardWriter(tmp_path / "x", Layout(LAYOUT.header, LAYOUT.offsets, 1 << 60))
    assert list(tmp_path.iterdir()) == []


def test_file_systems_without_preallocation_get_a_sparse_file(tmp_path: Path, monkeypatch) -> None:
    def unsupported(*_args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with ShardWriter(tmp_path / "x", LAYOUT) as w:
        w.write_at(A, b"12345678")
        w.commit()
    assert (tmp_path / "x").stat().st_size == LAYOUT.total


def test_without_preallocation_the_free_space_is_compared(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    with pytest.raises(OutputError, match="no room"):
        ShardWriter(tmp_path / "x", Layout(LAYOUT.header, LAYOUT.offsets, 1 << 60))


def test_a_disk_that_fails_at_commit_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    with ShardWriter(tmp_path / "x", LAYOUT) as w:
        w.write_at(A, bytes(8))
        monkeypatch.setattr(os, "fsync", no_space)
        with pytest.raises(OutputError, match="no room"):
            w.commit()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_durable_before_it_has_its_name_and_the_name_before_commit_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(("durable", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        calls.append(("named", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with ShardWriter(tmp_path / "x", LAYOUT) as w:
        w.write_at(A, bytes(8))
        assert calls == []
        w.commit()
    file, folder = (tmp_path / "x").stat().st_ino, tmp_path.stat().st_ino
    assert calls == [("durable", file), ("named", file), ("durable", folder)]


def test_two_writers_of_one_file_are_noticed(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", LAYOUT) as first, ShardWriter(tmp_path / "x", LAYOUT) as second:
        first.write_at(A, b"11111111")
        second.write_at(A, b"22222222")
        with pytest.raises(OutputError, match="another process"):
            first.commit()
        second.commit()
    assert (tmp_path / "x").read_bytes()[A:] == b"22222222"


def test_a_folder_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        ShardWriter(tmp_path / "none" / "x", LAYOUT)


@pytest.mark.parametrize("data", [b"", b"{}\n"])
def test_small_files_are_written_whole_with_their_folder(tmp_path: Path, data: bytes) -> None:
    write_file_atomic(tmp_path / "sub" / "config.json", data)
    assert (tmp_path / "sub" / "config.json").read_bytes() == data
    assert len(list((tmp_path / "sub").iterdir())) == 1


def test_a_small_file_is_replaced_or_left_alone(tmp_path: Path, monkeypatch) -> None:
    write_file_atomic(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "pwrite", no_space)
    with pytest.raises(OutputError, match="no room"):
        write_file_atomic(tmp_path / "x", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x", b"old")]


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_file_atomic(tmp_path / "x", b"1")
    mode = stat.S_IMODE((tmp_path / "x").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("size", [0, 5, 16, 33])
def test_copies_are_bit_for_bit(tmp_path: Path, monkeypatch, size: int) -> None:
    monkeypatch.setattr(writer, "_COPY_CHUNK", 16)
    (tmp_path / "a").write_bytes(bytes(range(size)))
    sha256 = copy_file_atomic(tmp_path / "a", tmp_path / "sub" / "b")
    assert sha256 == hashlib.sha256(bytes(range(size))).hexdigest()
    assert (tmp_path / "sub" / "b").read_bytes() == bytes(range(size))


def test_a_copied_link_becomes_a_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x")
    (tmp_path / "link").symlink_to("blob")
    copy_file_atomic(tmp_path / "link", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink()


def test_a_missing_source_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        copy_file_atomic(tmp_path / "none", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_the_safetensors_library_loads_what_was_written(tmp_path: Path) -> None:
    numpy_io = pytest.importorskip("safetensors.numpy")
    arrays = {
        "ä.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "codes": np.arange(256, dtype=np.uint8).reshape(2, 8, 16),
        "scalar": np.array(-7, np.int64),
        "empty": np.zeros((0, 4), np.float16),
    }
    names = {"float32": "F32", "uint8": "U8", "int64": "I64", "float16": "F16"}
    layout = build_header([(n, names[str(a.dtype)], a.shape) for n, a in arrays.items()], {"format": "pt", "k": "v"})
    with ShardWriter(tmp_path / "x.safetensors", layout) as w:
        for offset, array in zip(layout.offsets, arrays.values(), strict=True):
            w.write_at(offset, array)
        w.commit()
    loaded = numpy_io.load_file(tmp_path / "x.safetensors")
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in loaded.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in arrays.items()
    }


def test_the_safetensors_library_knows_every_dtype_as_we_do(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    from halfbyte.checkpoint.dtypes import BITS

    layout = build_header([(name, name, (2, 4)) for name in BITS])
    data = layout.header + bytes(i % 251 for i in range(layout.total - len(layout.header)))
    loaded = dict(safetensors.deserialize(data))
    for name, offset in zip(BITS, layout.offsets, strict=True):
        assert loaded[name]["dtype"] == name
        assert bytes(loaded[name]["data"]) == data[offset : offset + BITS[name]]


def begin(path: Path) -> None:
    with ShardWriter(path, LAYOUT) as w:
        w.write_at(A, bytes(8))
        w.commit()


@pytest.mark.parametrize("write", [begin, lambda path: write_file_atomic(path, b"12345678")], ids=["shard", "small"])
def test_an_interrupt_at_any_line_leaves_a_whole_file_or_none(tmp_path: Path, write: Callable[[Path], None]) -> None:
    lines, point = 0, 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != writer.__file__:
            return None
        if event == "line":
            lines += 1
            if lines == point:
                raise KeyboardInterrupt
        return trace

    finished = 0
    while not finished:
        lines, point = 0, point + 1
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            write(tmp_path / "x")
            finished = point
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        writer.remove_unfinished()
        assert {path.name for path in tmp_path.iterdir()} <= {"x"}, point
        if (tmp_path / "x").exists():
            assert (tmp_path / "x").read_bytes().endswith(bytes(8) if write is begin else b"12345678")
            (tmp_path / "x").unlink()
    assert finished > 30
