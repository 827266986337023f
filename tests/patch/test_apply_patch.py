"""The target comes out to the bit, or not at all."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from tests.small_models import hashes

from halfbyte.checkpoint import build_header
from halfbyte.errors import CheckpointError, OutputError
from halfbyte.patch.apply_patch import apply_patch
from halfbyte.patch.make_patch import make_patch
from halfbyte.patch.manifest import KEY


def test_every_file_of_the_target_comes_out_to_the_bit(ends: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = ends
    make_patch(base, tuned, tmp_path / "p.safetensors")
    made = apply_patch(base, tmp_path / "p.safetensors", tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tuned) and len(made.files) == len(hashes(tuned))


def test_a_patch_back_is_exact_too(ends: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = ends
    make_patch(tuned, base, tmp_path / "p.safetensors")
    apply_patch(tuned, tmp_path / "p.safetensors", tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(base)


def test_another_base_is_refused_before_anything_is_written(ends: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = ends
    make_patch(base, tuned, tmp_path / "p.safetensors")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    file = next(other.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not the file that the patch was made from"):
        apply_patch(other, tmp_path / "p.safetensors", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_no_flipped_bit_of_a_patch_passes(ends: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = ends
    patch = tmp_path / "p.safetensors"
    make_patch(base, tuned, patch)
    good, wanted = patch.read_bytes(), hashes(tuned)
    start = 8 + int.from_bytes(good[:8], "little")
    for place in np.linspace(start, len(good) - 1, 40).astype(int):
        bad = bytearray(good)
        bad[place] ^= 4
        patch.write_bytes(bad)
        try:
            apply_patch(base, patch, tmp_path / "out")
        except CheckpointError:
            continue
        finally:
            shutil.rmtree(tmp_path / "out.applying", ignore_errors=True)
        # bits of a frame that no decoder reads may change; the result may not
        assert hashes(tmp_path / "out") == wanted
        shutil.rmtree(tmp_path / "out")


def test_an_interrupted_run_continues(ends: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("halfbyte.patch.apply_patch")

    base, tuned = ends
    make_patch(base, tuned, tmp_path / "p.safetensors")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module.os, "rename", stop)
        apply_patch(base, tmp_path / "p.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made = apply_patch(base, tmp_path / "p.safetensors", tmp_path / "out")
    assert made.resumed == len(made.files) and hashes(tmp_path / "out") == hashes(tuned)


def test_an_existing_folder_is_refused(ends: tuple[Path, Path], tmp_path: Path) -> None:
    make_patch(*ends, tmp_path / "p.safetensors")
    with pytest.raises(OutputError, match="exists already"):
        apply_patch(ends[0], tmp_path / "p.safetensors", ends[1])


def invented(path: Path, manifest: dict[str, Any], stream: bytes = b"") -> Path:
    layout = build_header([("s", "U8", (len(stream),))], {KEY: json.dumps(manifest)})
    path.write_bytes(layout.header + stream)
    return path


def whole(name: str, size: int) -> dict[str, Any]:
    target = {"name": name, "sha256": "0" * 64, "size": size, "kind": "whole", "stream": "s"}
    return {"schema": 1, "made_by": "x", "base": {}, "targets": [target]}


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "c:evil"])
def test_a_strangers_patch_writes_nothing_outside(ends: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    patch = invented(tmp_path / "p.safetensors", whole(name, 3), zstandard.compress(b"abc"))
    with pytest.raises(CheckpointError, match="no plain path"):
        apply_patch(ends[0], patch, tmp_path / "out")


def test_a_stream_that_expands_without_end_is_stopped_at_its_size(ends: tuple[Path, Path], tmp_path: Path) -> None:
    bomb = zstandard.compress(bytes(1 << 28))
    patch = invented(tmp_path / "p.safetensors", whole("a.json", 10), bomb)
    with pytest.raises(CheckpointError, match="no stream of 10 bytes"):
        apply_patch(ends[0], patch, tmp_path / "out")


def test_content_with_another_hash_is_refused(ends: tuple[Path, Path], tmp_path: Path) -> None:
    patch = invented(tmp_path / "p.safetensors", whole("a.json", 3), zstandard.compress(b"abc"))
    with pytest.raises(CheckpointError, match="does not come out as the patch says"):
        apply_patch(ends[0], patch, tmp_path / "out")
    assert not (tmp_path / "out").exists()
