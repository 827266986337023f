from __future__ import annotations

import hashlib
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from halfbyte.checkpoint import LocalStore
from halfbyte.errors import CheckpointError
from halfbyte.stores import remote
from halfbyte.stores.remote import RemoteFile, RemoteStore


class Bytes(RemoteStore):
    """Files in memory."""

    def __init__(self, contents: dict[str, bytes], hashed: bool = False) -> None:
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        files = {n: RemoteFile(len(d), digests[n], digests[n] if hashed else None) for n, d in contents.items()}
        super().__init__("memory", files)
        self.contents = contents

    def fetch(self, name: str, offset: int, size: int) -> bytes:
        return self.contents[name][offset : offset + size]


def test_large_reads_are_several_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PART_BYTES", 100)
    store = Bytes({"a": bytes(range(250)) * 2})
    view = memoryview(bytearray(490))
    assert store.read_into("a", view, 30) == 470
    assert bytes(view[:470]) == (bytes(range(250)) * 2)[30:] and store.requests == 5 and store.bytes_read == 470


def test_hidden_and_deep_files_are_not_listed() -> None:
    store = Bytes(dict.fromkeys(("x.json", "a/y.json", "a/b/c.json", ".gitattributes", "a/.z"), b"1"))
    assert store.list() == {"x.json": 1, "a/y.json": 1, "a/b/": None}


@pytest.mark.parametrize("hashed", [False, True])
def test_samples_and_hashes_are_those_of_a_folder(tmp_path: Path, hashed: bool) -> None:
    contents = {"small": bytes(range(200)), "large": bytes(range(256)) * (17 << 12)}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    store, local = Bytes(contents, hashed), LocalStore(tmp_path)
    assert store.samples(["small", "large"]) == local.samples(["small", "large"])
    assert store.bytes_read < 4 << 20
    assert {name: store.sha256(name) for name in contents} == {name: local.sha256(name) for name in contents}


def test_small_files_are_read_once_and_copied(tmp_path: Path) -> None:
    store = Bytes({"a.json": b"{}", "model.safetensors": b"x"})
    assert store.read_small("a.json") == store.read_small("a.json") == b"{}" and store.requests == 1
    assert store.copy("a.json", tmp_path / "a.json") == hashlib.sha256(b"{}").hexdigest()
    assert [path.name for path in store.folder().iterdir()] == ["a.json"]


def test_a_second_thread_waits_until_the_folder_is_full() -> None:
    class Slow(Bytes):
        def fetch(self, name: str, offset: int, size: int) -> bytes:
            time.sleep(0.05)
            return super().fetch(name, offset, size)

    store = Slow({f"{i}.json": b"{}" for i in range(4)})
    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(lambda _: len(list(store.folder().iterdir())), range(2)))
    assert seen == [4, 4]


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointError, match="there is no b in memory"):
        Bytes({}).read_small("b")


def test_a_store_travels_to_another_process() -> None:
    store = pickle.loads(pickle.dumps(Bytes({"a": b"123"})))
    assert store.read_small("a") == b"123"
