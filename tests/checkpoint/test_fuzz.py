"""Damaged files: whatever the damage, reading ends at once and with nothing but a CheckpointError."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.checkpoint import Inventory, Reader, build_header
from halfbyte.errors import CheckpointError

LAYOUT = build_header([("a.weight", "BF16", (3, 2)), ("b", "F8_E4M3", (5,)), ("s", "F32", ()), ("n", "BOOL", (0,))])
GOOD = LAYOUT.header + bytes(range(LAYOUT.total - len(LAYOUT.header)))
INDEX = b'{"metadata":{"total_size":21.0},"weight_map":{"a.weight":"m.safetensors","b":"m.safetensors"}}'

positions = st.integers(0, len(GOOD) - 1)
fuzz = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def read_everything(folder: Path) -> None:
    began = time.process_time()
    try:
        inventory = Inventory.open(folder)
        assert len(inventory.fingerprint) == 64
        with Reader(inventory) as reader:
            for name, info in inventory.tensors.items():
                assert sum(len(chunk) for chunk in reader.chunks(name, 4)) == info.nbytes
                reader.read(name)
    except CheckpointError as error:
        assert str(error)  # any other exception fails the test
    assert time.process_time() - began < 1


@fuzz
@given(st.lists(st.tuples(positions, st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_refused_or_harmless(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for position, value in changes:
        data[position] = value
    (tmp_path / "model.safetensors").write_bytes(data)
    read_everything(tmp_path)


@fuzz
@given(positions, positions, st.binary(max_size=12))
def test_replaced_ranges_are_refused_or_harmless(tmp_path: Path, first: int, last: int, new: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(GOOD[:first] + new + GOOD[last:])
    read_everything(tmp_path)


@pytest.mark.parametrize("size", range(0, len(GOOD), 3))
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(GOOD[:size])
    with pytest.raises(CheckpointError):
        Inventory.open(tmp_path)


@fuzz
@given(st.lists(st.tuples(st.integers(0, len(INDEX) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_changed_index_is_refused_or_harmless(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(INDEX)
    for position, value in changes:
        data[position] = value
    (tmp_path / "m.safetensors").write_bytes(GOOD)
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    read_everything(tmp_path)


def test_a_file_name_that_no_file_system_has_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"a.weight": f"{'a' * 300}.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no plain path inside its folder"):
        Inventory.open(tmp_path)
