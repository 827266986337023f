from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.checkpoint import identity
from halfbyte.checkpoint.identity import SourceIdentity, identities
from halfbyte.checkpoint.store import LocalStore
from halfbyte.errors import CheckpointError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    path.write_bytes(bytes(range(256)) * 400)
    return path


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as large from 1 KiB on, and no sample sees all of one."""
    monkeypatch.setattr(identity, "WHOLE_BYTES", 1024)
    monkeypatch.setattr(identity, "PLACE_BYTES", 16)
    monkeypatch.setattr(identity, "_PLACES", 3)


def of(path: Path) -> SourceIdentity:
    return SourceIdentity(LocalStore(path.parent), identities(path.parent, [path.name]))


def rewritten(path: Path) -> None:
    path.write_bytes(bytes(reversed(path.read_bytes())))


def flipped_between_samples(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def flipped_and_dated_back(path: Path) -> None:
    before = path.stat()
    flipped_between_samples(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced_by_a_copy_of_the_same_age(path: Path) -> None:
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    other = path.with_suffix(".new")
    other.write_bytes(content)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


def cut(path: Path) -> None:
    os.truncate(path, 5000)


CHANGES = [rewritten, flipped_between_samples, flipped_and_dated_back, replaced_by_a_copy_of_the_same_age, cut]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("sampled")
def test_a_changed_file_is_noticed_after_an_interruption(file: Path, change: Callable[[Path], None]) -> None:
    noted = of(file).to_dict()
    assert of(file).changed(noted) is None
    change(file)
    assert of(file).changed(noted) == file.name


@pytest.mark.parametrize("change", CHANGES)
def test_a_small_file_is_compared_completely(file: Path, change: Callable[[Path], None]) -> None:
    noted = of(file).to_dict()
    change(file)
    assert of(file).changed(noted) == file.name


def test_a_small_file_with_the_same_content_is_the_same(file: Path, tmp_path: Path) -> None:
    noted = of(file).to_dict()
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    assert of(file).changed(noted) is None


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("sampled")
def test_a_file_that_changes_during_the_work_is_noticed(file: Path, change: Callable[[Path], None]) -> None:
    source = of(file)
    source.check()
    change(file)
    with pytest.raises(CheckpointError, match=r"w\.safetensors changed after the plan was made"):
        source.check()


def test_files_that_came_or_went_are_noticed(file: Path) -> None:
    noted = of(file).to_dict()
    assert of(file).changed({**noted, "other": noted[file.name]}) == "other"
    assert of(file).changed({}) == file.name


@pytest.mark.usefixtures("sampled")
def test_a_blob_of_the_hub_that_was_fetched_again_proves_itself_by_its_name(tmp_path: Path) -> None:
    content = bytes(range(256)) * 400
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(content)
    link = tmp_path / "snapshots" / "w.safetensors"
    link.parent.mkdir()
    link.symlink_to(Path("../blobs") / blob.name)
    noted = of(link).to_dict()
    assert noted["w.safetensors"]["etag"] == blob.name
    blob.unlink()
    blob.write_bytes(content)
    assert of(link).changed(noted) is None
    flipped_between_samples(blob)
    assert of(link).changed(noted) == "w.safetensors"
