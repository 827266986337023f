"""What a patch holds, and how small it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.small_models import hashes

from halfbyte.checkpoint import Inventory
from halfbyte.errors import CheckpointError
from halfbyte.patch.make_patch import make_patch
from halfbyte.patch.manifest import read_manifest


def test_a_patch_of_a_small_change_is_a_fraction_of_the_file(ends: tuple[Path, Path], tmp_path: Path) -> None:
    made = make_patch(*ends, tmp_path / "p.safetensors")
    assert made.nbytes < 0.35 * made.target_bytes
    assert made.same_tensors and made.changed_tensors


def test_files_that_are_the_same_cost_nothing(ends: tuple[Path, Path], tmp_path: Path) -> None:
    made = make_patch(ends[0], ends[0], tmp_path / "p.safetensors")
    assert made.changed_tensors == 0 and made.same_files == len(hashes(ends[0]))
    assert {target.kind for target in read_manifest(Inventory.open(made.path)).targets} == {"same"}


def test_the_same_ends_give_the_same_bytes(ends: tuple[Path, Path], tmp_path: Path) -> None:
    for name in "ab":
        make_patch(*ends, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_patch_needs_folders_of_safetensors(ends: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        make_patch(tmp_path / "none", ends[1], tmp_path / "p.safetensors")
    assert not (tmp_path / "p.safetensors").exists()
