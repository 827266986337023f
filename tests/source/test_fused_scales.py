"""Scales of what engines fuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.small_models import MOE_CONFIG, moe_tensors, run, write_checkpoint

from halfbyte.checkpoint import Reader
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.fused_scales import FusedScale, fused_scales


def scales(folder: Path, recipe: str, dialect: str) -> list[FusedScale]:
    source = write_checkpoint(folder / "source", moe_tensors(), MOE_CONFIG)
    run(source, folder / "out", recipe, dialect)
    checkpoint = Checkpoint.open(folder / "out")
    with Reader(checkpoint.inventory) as reader:
        return list(fused_scales(checkpoint, reader))


@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt"])
def test_groups_are_matrices_and_the_projections_of_each_expert(tmp_path: Path, dialect: str) -> None:
    groups: dict[str, list[FusedScale]] = {}
    for scale in scales(tmp_path, "nvfp4", dialect):
        groups.setdefault(scale.group, []).append(scale)
    sizes = {group: len(members) for group, members in groups.items()}
    assert all(len({member.value for member in members}) == 1 for members in groups.values())
    assert sorted(set(sizes.values())) == [2, 3]
    assert sum(".experts.gate_up_proj." in group for group in groups) == 8


def test_formats_without_a_scale_for_the_whole_matrix_have_none(tmp_path: Path) -> None:
    assert scales(tmp_path, "mxfp4", "compressed-tensors") == []
