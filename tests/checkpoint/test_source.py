from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from halfbyte.checkpoint.source import Source, resolve
from halfbyte.errors import CheckpointError

from .builders import write_index

COMMIT = "0123456789" * 4


class FakeHub:
    """Stands for snapshot_download: remembers what was asked and makes the given files appear in turn."""

    def __init__(self, root: Path, *rounds: list[str]) -> None:
        self.root, self.rounds, self.calls = root / COMMIT, list(rounds), []

    def __call__(self, repository, *, revision, allow_patterns, ignore_patterns) -> str:
        self.calls.append((repository, revision, allow_patterns, ignore_patterns))
        for name in self.rounds.pop(0):
            self.root.mkdir(exist_ok=True)
            if name.endswith("index.json"):
                write_index(self.root, {"a": "model-2.safetensors", "b": "model-1.safetensors"})
            else:
                (self.root / name).write_bytes(b"")
        return str(self.root)


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve(tmp_path) == Source(tmp_path)


def test_a_file_is_its_folder_and_its_name(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert resolve(str(tmp_path / "x.safetensors")) == Source(tmp_path, "x.safetensors")


@pytest.mark.parametrize("text", ["gpt2", "./a/b", "a/b/c", "x.safetensors", "own/x.safetensors", "", "a b/c", "../x"])
def test_a_path_that_is_neither_here_nor_a_hub_id_is_refused(tmp_path: Path, monkeypatch, text: str) -> None:
    empty = tmp_path / "empty" / "inner"
    empty.mkdir(parents=True)
    monkeypatch.chdir(empty)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    if text:
        with pytest.raises(CheckpointError, match="no hub id"):
            resolve(text)
    else:
        assert resolve(text).root == Path()


@pytest.mark.parametrize("text", ["a\0b", "x" * 5000])
def test_an_impossible_path_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError):
        resolve(text)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"neither a folder nor a \.safetensors or \.gguf file"):
        resolve(tmp_path / "model.bin")


def test_a_revision_of_a_local_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only applies to a hub id"):
        resolve(tmp_path, "main")


def test_a_local_folder_hides_a_hub_id_of_the_same_name(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert resolve("acme/tiny") == Source(Path("acme/tiny"))


def test_only_the_shards_of_the_index_are_fetched_from_one_commit(tmp_path: Path, monkeypatch) -> None:
    hub = FakeHub(tmp_path, ["config.json", "model.safetensors.index.json"], ["model-1.safetensors"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve("acme/tiny", "v1") == Source(tmp_path / COMMIT, None, COMMIT)
    first, second = hub.calls
    assert first[:3] == ("acme/tiny", "v1", None)
    assert {"*.safetensors", "*.bin", "*.gguf"} <= set(first[3])
    assert second == ("acme/tiny", COMMIT, ["model-1.safetensors", "model-2.safetensors"], None)


def test_without_an_index_the_usual_names_are_fetched(tmp_path: Path, monkeypatch) -> None:
    hub = FakeHub(tmp_path, ["config.json"], ["model.safetensors"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    resolve("acme/tiny")
    assert hub.calls[1][2] == ["model.safetensors", "model-*.safetensors"]


def test_a_repository_of_one_oddly_named_file_is_fetched(tmp_path: Path, monkeypatch) -> None:
    hub = FakeHub(tmp_path, [], [], ["odd.safetensors"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert (resolve("acme/tiny").root / "odd.safetensors").exists()


def test_a_failed_download_is_one_sentence(monkeypatch) -> None:
    def fail(*_args, **_kwargs):
        raise OSError("first line\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"acme/none .* at revision v1 \(OSError: first line\)$"):
        resolve("acme/none", "v1")


def test_offline_the_cache_is_used(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"")
    (tmp_path / "models--acme--tiny" / "refs").mkdir()
    (tmp_path / "models--acme--tiny" / "refs" / "main").write_text(COMMIT)
    assert resolve("acme/tiny").root == snapshot
    with pytest.raises(CheckpointError, match="acme/other is no local path"):
        resolve("acme/other")
