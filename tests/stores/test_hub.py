from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from halfbyte.checkpoint import Inventory, Reader
from halfbyte.errors import CheckpointError, UnconvertibleError
from halfbyte.stores import hub as hub_module
from halfbyte.stores.hub import HubStore
from small_models import DENSE_CONFIG, dense_tensors, write_checkpoint

from .hub_server import COMMIT, FakeHub, of_folder, served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny", dense_tensors(), DENSE_CONFIG)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with served(of_folder("acme/tiny", folder), monkeypatch, tmp_path / "cache") as hub:
        yield hub


def opened(revision: str | None = None) -> tuple[HubStore, Inventory]:
    store = HubStore.open("acme/tiny", revision)
    return store, Inventory.from_store(store, "acme/tiny", store.commit)


def test_an_inventory_is_that_of_a_download_and_names_the_commit(hub: FakeHub, folder: Path) -> None:
    _, inventory = opened("main")
    local = Inventory.open(folder)
    assert inventory.revision == COMMIT and inventory.root is None
    assert inventory.fingerprint == local.fingerprint and inventory.side_files == local.side_files


def test_tensors_are_those_of_a_download(hub: FakeHub, folder: Path) -> None:
    _, inventory = opened()
    with Reader(inventory) as reader, Reader(Inventory.open(folder)) as local:
        for name in inventory.tensors:
            assert bytes(reader.chunk(name, 0, inventory.tensors[name].nbytes)) == bytes(
                local.chunk(name, 0, inventory.tensors[name].nbytes)
            )


def test_an_expired_signed_url_is_renewed(hub: FakeHub) -> None:
    hub.lifetime = 2
    store, inventory = opened()
    info = next(iter(inventory.tensors.values()))
    for _ in range(6):
        assert len(store.fetch(info.file, info.offset, 8)) == 8
    assert hub.counts[403] >= 2


def test_a_busy_hub_and_cut_lines_only_take_time(hub: FakeHub) -> None:
    hub.busy = hub.broken = 3
    store, inventory = opened()
    info = next(iter(inventory.tensors.values()))
    assert len(store.fetch(info.file, info.offset, info.nbytes)) == info.nbytes
    assert hub.counts[429] == 3 and not hub.broken


def test_a_hub_that_stays_busy_is_one_sentence(hub: FakeHub) -> None:
    store, inventory = opened()
    hub.busy = 1000
    with pytest.raises(CheckpointError, match=r"cannot be read from the hub \(status 429\)"):
        store.fetch(next(iter(inventory.files)), 0, 8)


def test_a_hub_that_is_not_there_is_one_sentence(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="acme/tiny is no local path and cannot be fetched from the hub"):
        HubStore.open("acme/tiny")


def test_the_login_goes_to_the_hub_and_not_to_signed_urls(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_test"
    with pytest.raises(CheckpointError, match="acme/tiny is no local path and cannot be fetched"):
        HubStore.open("acme/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    store, inventory = opened()  # the server answers 403 to a signed URL with a token
    assert inventory.tensors and not hub.counts[403]
    monkeypatch.delenv("HF_TOKEN")
    store._signed.clear()
    with pytest.raises(CheckpointError, match="may not be read with this login"):
        store.fetch(next(iter(inventory.files)), 0, 8)


@pytest.mark.parametrize("revision", ["v9", "f" * 40])
def test_an_unknown_revision_is_named(hub: FakeHub, revision: str) -> None:
    with pytest.raises(CheckpointError, match=f"at revision {revision}"):
        HubStore.open("acme/tiny", revision)


def test_a_file_that_was_replaced_is_refused(hub: FakeHub) -> None:
    store, inventory = opened()
    name = next(iter(inventory.files))
    store._signed.clear()
    hub.etags[name] = "0" * 64
    with pytest.raises(UnconvertibleError, match="changed after the plan was made"):
        store.fetch(name, 0, 8)


def test_a_file_that_was_removed_is_named(hub: FakeHub) -> None:
    store, inventory = opened()
    name = next(iter(inventory.files))
    store._signed.clear()
    hub.removed.add(name)
    with pytest.raises(CheckpointError, match=f"{name} is no longer in acme/tiny at {COMMIT}"):
        store.fetch(name, 0, 8)


def test_whole_files_in_place_of_ranges_are_cut_or_refused(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    store, inventory = opened()
    name = next(iter(inventory.files))
    wanted = store.fetch(name, 5, 10)
    hub.ranges = False
    assert store.fetch(name, 5, 10) == wanted
    monkeypatch.setattr(hub_module, "_WHOLE_BYTES", 16)
    with pytest.raises(CheckpointError, match="whole files where ranges are asked for"):
        store.fetch(name, 5, 10)
