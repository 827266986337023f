"""llama.cpp's files: layouts, real files, and damage that ends in nothing but a CheckpointError."""

from __future__ import annotations

import os
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.calibration import Importance, read_importance
from halfbyte.calibration.imatrix import write_dat, write_gguf
from halfbyte.errors import CheckpointError, HalfbyteError


def dat(*entries: tuple[str, int, list[float]], tail: bytes = b"") -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, calls, sums in entries:
        parts.append(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(sums)))
        parts.append(struct.pack(f"<{len(sums)}f", *sums))
    return b"".join(parts) + tail


GOOD = dat(("blk.0.attn_q.weight", 2, [2.0, 4.0, 6.0]), ("blk.0.ffn_down.weight", 4, [4.0] * 5))
TAIL = struct.pack("<ii", 7, 4) + b"wiki"
fuzz = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
positions = st.integers(0, len(GOOD + TAIL) - 1)


def read(folder: Path, data: bytes) -> Importance:
    path = folder / "imatrix.dat"
    path.write_bytes(data)
    return read_importance(path)


def test_sums_are_divided_by_calls(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    assert found.spelling == "gguf" and list(found.values) == ["blk.0.attn_q.weight", "blk.0.ffn_down.weight"]
    np.testing.assert_array_equal(found.values["blk.0.attn_q.weight"], np.float32([1, 2, 3]))
    assert found.counts["blk.0.ffn_down.weight"] == 4 and found.datasets == () and found.chunks == 0


def test_last_chunk_and_data_set_are_read(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD + TAIL)
    assert found.chunks == 7 and found.datasets == ("wiki",)


def test_an_entry_without_calls_has_no_data(tmp_path: Path) -> None:
    assert read(tmp_path, dat(("a", 0, [5.0]))).counts["a"] == 0


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "truncated"),
        (GOOD[:-1], "truncated"),
        (GOOD + TAIL + b"x", "1 bytes follow its end"),
        (struct.pack("<i", -1), "claims -1 entries"),
        (struct.pack("<ii", 1, 99_999), "length of the name of entry 1 of 1 is 99999"),
        (dat(("a", 1, [1.0]), ("a", 1, [1.0])), "holds a twice"),
        (dat(("a", 1, [-1.0])), "negative or not finite"),
        (dat(("a", 1, [float("nan")])), "negative or not finite"),
        (dat(("a", -1, [1.0])), "has -1 calls"),
        (dat(("a", 1, [])), "0 values"),
        (dat(("", 1, [1.0])), "entry 1 of 1"),
        (struct.pack("<ii", 1, 1) + b"\xff" + struct.pack("<iif", 1, 1, 1.0), "not valid text"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path: Path, data: bytes, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem) as found:
        read(tmp_path, data)
    assert "imatrix.dat" in str(found.value) and "\n" not in str(found.value)


@fuzz
@given(st.lists(st.tuples(positions, st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_refused_or_harmless(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD + TAIL)
    for position, value in changes:
        data[position] = value
    try:
        read(tmp_path, bytes(data))
    except CheckpointError as error:
        assert str(error)


@fuzz
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CheckpointError):
        read(tmp_path, data)


@pytest.mark.parametrize(
    ("file", "entries", "hidden"),
    [("imatrix.dat", 154, 2048), ("imatrix2.dat", 238, 2560), ("imatrix4.dat", 252, 2048)],
)
def test_real_files_are_read_and_written_byte_for_byte(
    shared: Path, tmp_path: Path, file: str, entries: int, hidden: int
) -> None:
    source = shared / "data" / "imatrix" / file
    found = read_importance(source)
    assert len(found.values) == entries and found.datasets == ("imatrix-training-full-3",)
    assert found.values["blk.0.attn_q.weight"].shape == (hidden,)
    write_dat(found, tmp_path / "again.dat")
    assert (tmp_path / "again.dat").read_bytes() == source.read_bytes()


def test_gguf_files_keep_means_counts_and_notes(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    values = {"blk.0.attn_q.weight": np.float32([1, 2]), "blk.0.ffn_up_exps.weight": np.float32([[1, 2], [3, 4]])}
    counts = {"blk.0.attn_q.weight": np.asarray(8), "blk.0.ffn_up_exps.weight": np.asarray([3, 5])}
    write_gguf(Importance(values, counts, "gguf", ("wiki", "code"), 4), tmp_path / "i.gguf")
    found = read_importance(tmp_path / "i.gguf")
    assert found.datasets == ("wiki", "code") and found.chunks == 4
    for name in values:
        np.testing.assert_allclose(found.values[name], values[name], rtol=1e-6)
        np.testing.assert_array_equal(found.counts[name], counts[name])
    assert not list(tmp_path.glob("*.partial"))


def write_tensors(path: Path, tensors: dict[str, np.ndarray], kind: str = "imatrix") -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type(kind)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_expert_that_no_token_reached_has_count_zero(tmp_path: Path) -> None:
    sums = {"w.in_sum2": np.float32([[0, 0], [4, 8]]), "w.counts": np.float32([[0], [2]])}
    found = read_importance(write_tensors(tmp_path / "i.gguf", sums))
    np.testing.assert_array_equal(found.values["w"], np.float32([[0, 0], [2, 4]]))
    np.testing.assert_array_equal(found.counts["w"], [0, 2])


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"w.in_sum2": np.float32([[1, 2]])}, "lacks w.counts"),
        ({"w.in_sum2": np.float32([[1, 2]]), "w.counts": np.float32([[1], [1]])}, "1 matrices, but counts for 2"),
        ({"w.in_sum2": np.float32([[1, -2]]), "w.counts": np.float32([[1]])}, "negative or not finite"),
        ({"w.in_sum2": np.float32([[1, 2]]), "w.counts": np.float32([[np.nan]])}, "counts of w"),
        ({"w.in_sum2": np.float32([[1]]), "w.counts": np.float32([[1]]), "x": np.float32([1])}, "holds x"),
        ({"w.in_sum2": np.float16([[1, 2]]), "w.counts": np.float32([[1]])}, "is F16, but importance is FP32"),
        ({}, "no importance entries"),
    ],
)
def test_a_gguf_file_that_does_not_add_up_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        read_importance(write_tensors(tmp_path / "i.gguf", tensors))


def test_a_gguf_model_is_no_importance(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"general\.type is 'model'"):
        read_importance(write_tensors(tmp_path / "m.gguf", {"w": np.float32([1])}, "model"))


@fuzz
@given(st.data())
def test_damaged_gguf_files_are_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "i.gguf"
    if not path.exists():
        write_tensors(path, {"w.in_sum2": np.float32([[1, 2]]), "w.counts": np.float32([[1]])})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(4, len(content)))
    (tmp_path / "bad.gguf").write_bytes(content[:cut])
    try:
        read_importance(tmp_path / "bad.gguf")
    except CheckpointError as error:
        assert str(error)


def test_only_writing_needs_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tensors(tmp_path / "i.gguf", {"w.in_sum2": np.float32([[2, 4]]), "w.counts": np.float32([[2]])})
    monkeypatch.setitem(sys.modules, "gguf", None)
    found = read_importance(path)
    np.testing.assert_array_equal(found.values["w"], np.float32([1, 2]))
    with pytest.raises(HalfbyteError, match=r"pip install 'halfbyte\[gguf\]'"):
        write_gguf(found, tmp_path / "again.gguf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are needed")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "i.dat")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_importance(tmp_path / "i.dat")


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.dat cannot be read"):
        read_importance(tmp_path / "nothing.dat")


def test_a_signalling_nan_is_refused_without_a_warning(tmp_path: Path) -> None:
    entry = struct.pack("<i", 1) + b"a" + struct.pack("<iiI", 2, 1, 0x7FA00000)  # a signalling NaN
    (tmp_path / "imatrix.dat").write_bytes(struct.pack("<i", 1) + entry)
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match="negative or not finite"):
        warnings.simplefilter("error")
        read_importance(tmp_path / "imatrix.dat")
