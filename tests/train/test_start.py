"""Starts: a checkpoint or a plan, and the plan of the export."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.train.start import origin_of
from small_models import DENSE_CONFIG, dense_tensors, linear, recipe, run, write_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m", dense_tensors(), DENSE_CONFIG)


def test_a_checkpoint_is_written_again_in_its_own_formats(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", linear("mixfp4"))
    origin = origin_of(tmp_path / "out")
    assert {item.format.name for item in origin.items.values() if item.format} == {"mixfp4"}
    assert origin.export_plan.dialect.name == "halfbyte" and origin.name == "out"
    assert origin.plan_for("compressed-tensors").dialect.name == "compressed-tensors"


def test_a_plan_is_its_own_export(source: Path) -> None:
    plan = make_plan(Checkpoint.open(source), linear("nvfp4"))
    assert origin_of(plan).plan_for(None) is plan
    assert origin_of(plan).plan_for("modelopt").recipe is plan.recipe


def test_fitted_global_scales_cannot_follow_masters(source: Path) -> None:
    soar = recipe({"match": "linear", "format": "nvfp4", "global_scale": "soar"})
    origin = origin_of(make_plan(Checkpoint.open(source), soar))
    with pytest.raises(HalfbyteError, match="soar"):
        origin.searched(next(iter(origin.items)), "sweep")


def test_an_unquantized_checkpoint_is_no_start(source: Path) -> None:
    with pytest.raises(HalfbyteError, match="quantize it first"):
        origin_of(source)
