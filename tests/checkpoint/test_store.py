from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from halfbyte.checkpoint import Inventory, LocalStore, Reader
from halfbyte.checkpoint.store import Store
from halfbyte.errors import CheckpointError

from .builders import write_floats


class Elsewhere(LocalStore):
    """A folder that claims to lie on another machine, and counts what is read of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = None
        self.reads: list[tuple[str, int, int]] = []

    def read_into(self, name: str, view: memoryview, offset: int) -> int:
        self.reads.append((name, offset, len(view)))
        return super().read_into(name, view, offset)


def test_a_local_store_reads_what_lies_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"0123456789")
    store: Store = LocalStore(tmp_path)
    part = memoryview(bytearray(4))
    assert store.read_into("a.json", part, 3) == 4 and bytes(part) == b"3456"
    assert store.read_into("a.json", part, 8) == 2
    assert store.read_small("a.json") == b"0123456789" and store.list() == {"a.json": 10}
    digest = hashlib.sha256(b"0123456789").hexdigest()
    assert store.sha256("a.json") == digest and store.samples(["a.json"]) == {"a.json": digest}
    assert store.copy("a.json", tmp_path / "b.json") == digest and (tmp_path / "b.json").read_bytes() == b"0123456789"
    assert store.folder() == store.root == tmp_path


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert not store.exists("a") and not store.is_file("a")
    for call in (store.read_small, store.sha256, store.identify):
        with pytest.raises(CheckpointError, match=r"a cannot be read \(No such file"):
            call("a")


def test_an_inventory_of_a_store_elsewhere_reads_the_same_values_by_ranges(tmp_path: Path) -> None:
    write_floats(tmp_path / "model.safetensors", "a", "b", rows=4)
    local = Inventory.open(tmp_path)
    store = Elsewhere(tmp_path)
    remote = Inventory.from_store(store, "elsewhere")
    assert remote.root is None and remote.fingerprint == local.fingerprint
    with Reader(local) as left, Reader(remote) as right:
        assert (left.read("a", 1, 3) == right.read("a", 1, 3)).all()
    info = local.tensors["a"]
    assert store.reads == [("model.safetensors", info.offset + 8, 16)]


def test_a_store_elsewhere_that_ends_early_is_an_error(tmp_path: Path) -> None:
    write_floats(tmp_path / "model.safetensors", "a", rows=4)
    inventory = Inventory.from_store(Elsewhere(tmp_path), "elsewhere")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(inventory.tensors["a"].offset + 5)
    with Reader(inventory) as reader, pytest.raises(CheckpointError, match="truncated: 5 of 32 bytes"):
        reader.read("a")


def test_an_inventory_without_files_has_no_store() -> None:
    with pytest.raises(CheckpointError, match="inventory without weights"):
        _ = Inventory({}, {}, source="x.json").store
