from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from halfbyte.checkpoint import Inventory, Reader, ShardWriter, build_header, reader, safetensors_name
from halfbyte.errors import CheckpointError

from .builders import entry, write_raw

ARRAYS = {
    "bf16": np.arange(24, dtype=np.float32).reshape(4, 3, 2).astype(ml_dtypes.bfloat16),
    "e4m3": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(16, 16),
    "e8m0": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu),
    "e5m2": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2).reshape(2, 128),
    "i64": np.array([[-(2**63), 2**63 - 1]], np.int64),
    "bool": np.array([True, False, True]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 5), np.float16),
    "no_columns": np.zeros((3, 0), np.float16),
}


@pytest.fixture
def inventory(tmp_path: Path) -> Inventory:
    layout = build_header([(name, safetensors_name(a.dtype), a.shape) for name, a in ARRAYS.items()])
    with ShardWriter(tmp_path / "model.safetensors", layout) as writer:
        for offset, array in zip(layout.offsets, ARRAYS.values(), strict=True):
            writer.write_at(offset, array)
        writer.commit()
    return Inventory.open(tmp_path)


@pytest.mark.parametrize("name", ARRAYS)
def test_every_dtype_and_shape_is_read_bit_for_bit(inventory: Inventory, name: str) -> None:
    with Reader(inventory) as r:
        array = r.read(name)
    assert (array.dtype, array.shape) == (ARRAYS[name].dtype, ARRAYS[name].shape)
    assert array.tobytes() == ARRAYS[name].tobytes()


def test_an_array_is_writable_and_independent(inventory: Inventory) -> None:
    with Reader(inventory) as r:
        r.read("bf16")[:] = 0
        assert r.read("bf16")[3, 2, 1] == 23


@pytest.mark.parametrize(("start", "stop"), [(1, 3), (None, 2), (3, None), (2, 2), (0, 4), (4, 4)])
def test_rows_are_slices_of_the_leading_axis(inventory: Inventory, start: int | None, stop: int | None) -> None:
    with Reader(inventory) as r:
        rows = r.read("bf16", start, stop)
    assert rows.shape == ARRAYS["bf16"][start:stop].shape
    assert rows.tobytes() == ARRAYS["bf16"][start:stop].tobytes()


def test_only_the_bytes_of_the_rows_are_read(inventory: Inventory, monkeypatch) -> None:
    seen: list[tuple[int, int]] = []
    original = reader.read_into

    def spy(descriptor: int, view: memoryview, offset: int) -> int:
        seen.append((offset, len(view)))
        return original(descriptor, view, offset)

    monkeypatch.setattr(reader, "read_into", spy)
    with Reader(inventory) as r:
        r.read("bf16", 1, 3)
    assert seen == [(inventory.tensors["bf16"].offset + 12, 24)]


@pytest.mark.parametrize("rows", [(0, 5), (-1, 2), (3, 2), (5, 5)])
def test_rows_outside_of_the_tensor_are_refused(inventory: Inventory, rows: tuple[int, int]) -> None:
    with Reader(inventory) as r, pytest.raises(CheckpointError, match="outside tensor bf16"):
        r.read("bf16", *rows)


def test_a_scalar_has_no_rows(inventory: Inventory) -> None:
    with Reader(inventory) as r, pytest.raises(CheckpointError, match="outside tensor scalar"):
        r.read("scalar", 0, 0)


def test_rows_of_tensors_without_bytes_keep_their_shape(inventory: Inventory) -> None:
    with Reader(inventory) as r:
        assert r.read("no_columns", 1, 2).shape == (1, 0)
        assert r.read("empty", 0, 0).shape == (0, 5)


@pytest.mark.parametrize("size", [1, 7, 48, 1000])
def test_chunks_are_the_raw_bytes_in_order(inventory: Inventory, size: int) -> None:
    with Reader(inventory) as r:
        chunks = list(r.chunks("bf16", size))
    assert all(len(chunk) == size for chunk in chunks[:-1])
    assert b"".join(chunks) == ARRAYS["bf16"].tobytes()


@pytest.mark.parametrize("start, size", [(0, 48), (5, 7), (48, 0)])
def test_a_chunk_is_any_part_of_the_raw_bytes(inventory: Inventory, start: int, size: int) -> None:
    with Reader(inventory) as r:
        assert r.chunk("bf16", start, size) == ARRAYS["bf16"].tobytes()[start : start + size]


@pytest.mark.parametrize("start, size", [(-1, 4), (40, 9), (49, 0)])
def test_a_chunk_outside_of_the_tensor_is_refused(inventory: Inventory, start: int, size: int) -> None:
    with Reader(inventory) as r, pytest.raises(CheckpointError, match="outside tensor bf16 of 48 bytes"):
        r.chunk("bf16", start, size)


def test_a_tensor_is_read_into_a_part_of_an_array(inventory: Inventory) -> None:
    array = np.zeros((2, *ARRAYS["bf16"].shape), ml_dtypes.bfloat16)
    with Reader(inventory) as r:
        r.read_into("bf16", array[1])
    assert not array[0].any() and array[1].tobytes() == ARRAYS["bf16"].tobytes()


def test_a_tensor_is_read_into_arrays_of_other_types_and_strides(inventory: Inventory) -> None:
    wide, strided = np.zeros((4, 3, 2), np.float32), np.zeros((4, 3, 4), ml_dtypes.bfloat16)
    with Reader(inventory) as r:
        r.read_into("bf16", wide)
        r.read_into("bf16", strided[..., ::2])
    assert (wide == ARRAYS["bf16"].astype(np.float32)).all()
    assert strided[..., ::2].tobytes() == ARRAYS["bf16"].tobytes() and not strided[..., 1::2].any()


def test_a_tensor_is_not_read_into_an_array_of_another_shape(inventory: Inventory) -> None:
    with Reader(inventory) as r, pytest.raises(ValueError):
        r.read_into("bf16", np.zeros((2, 3, 4), ml_dtypes.bfloat16))


@pytest.mark.parametrize("cached", [False, True])
def test_only_a_file_that_was_not_cached_is_dropped_from_the_cache(
    tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = build_header([("large", "U8", (3 << 20,)), ("small", "U8", (100,))])
    with ShardWriter(tmp_path / "model.safetensors", layout) as writer:
        writer.write_at(layout.offsets[0], np.ones(3 << 20, np.uint8))
        writer.write_at(layout.offsets[1], np.ones(100, np.uint8))
        writer.commit()
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(reader, "is_cached", lambda *_: cached)
    monkeypatch.setattr(reader, "forget_pages", lambda _, offset, size: dropped.append((offset, size)))
    with Reader(Inventory.open(tmp_path)) as r:
        assert r.read("large").all() and r.read("small").all()
    assert dropped == ([] if cached else [(layout.offsets[0], 3 << 20)])


def test_a_tensor_without_bytes_has_no_chunks(inventory: Inventory) -> None:
    with Reader(inventory) as r:
        assert list(r.chunks("empty", 8)) == []


def test_packed_tensors_can_be_copied_but_not_read(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"codes": entry("F4", [2, 4], 0, 4)}, b"\x01\x23\x45\x67")
    with Reader(Inventory.open(tmp_path)) as r:
        assert b"".join(r.chunks("codes", 3)) == b"\x01\x23\x45\x67"
        with pytest.raises(CheckpointError, match="F4"):
            r.read("codes")


def test_an_unknown_tensor_is_named(inventory: Inventory) -> None:
    with Reader(inventory) as r, pytest.raises(CheckpointError, match="no tensor nothing"):
        r.read("nothing")


def test_a_file_that_shrank_after_it_was_opened_is_noticed(inventory: Inventory) -> None:
    assert inventory.root is not None
    with Reader(inventory) as r:
        r.read("bf16")
        with (inventory.root / "model.safetensors").open("r+b") as file:
            file.truncate(inventory.tensors["e4m3"].offset + 5)
        with pytest.raises(CheckpointError, match=r"tensor e4m3 in model\.safetensors is truncated: 5 of 256"):
            r.read("e4m3")


@pytest.mark.parametrize("size", [0, 20])
def test_a_file_that_is_not_what_the_inventory_saw_is_refused(inventory: Inventory, size: int) -> None:
    assert inventory.root is not None
    (inventory.root / "model.safetensors").write_bytes(bytes(size))
    with Reader(inventory) as r, pytest.raises(CheckpointError, match=r"model\.safetensors"):
        r.read("empty")


def test_a_file_that_vanished_is_named(inventory: Inventory) -> None:
    assert inventory.root is not None
    (inventory.root / "model.safetensors").unlink()
    with Reader(inventory) as r, pytest.raises(CheckpointError, match=r"model\.safetensors"):
        r.read("bf16")


def test_a_closed_reader_says_so(inventory: Inventory) -> None:
    with Reader(inventory) as r:
        r.read("bf16")
    with pytest.raises(CheckpointError, match="closed"):
        r.read("bf16")


def test_an_inventory_without_weights_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"tensors": {"a": ["U8", [1]]}}')
    with pytest.raises(CheckpointError, match="without weights"):
        Reader(Inventory.from_json(tmp_path / "x.json"))


def test_threads_share_a_reader(inventory: Inventory) -> None:
    names = list(ARRAYS) * 20
    with Reader(inventory) as r, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(r.read, names))
    assert all(a.tobytes() == ARRAYS[n].tobytes() for a, n in zip(results, names, strict=True))


def test_real_weights_equal_those_of_the_safetensors_library(shared: Path) -> None:
    numpy_io = pytest.importorskip("safetensors.numpy")
    folder = shared / "data" / "models" / "stories260K"
    expected = numpy_io.load_file(folder / "model.safetensors")
    with Reader(Inventory.open(folder)) as r:
        assert set(expected) == set(r.inventory.tensors)
        for name, array in expected.items():
            np.testing.assert_array_equal(r.read(name), array)
