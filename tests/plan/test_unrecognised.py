"""Matrices that no role was found for are counted, named, and too many of them refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from halfbyte.errors import PlanError
from halfbyte.plan.build import make_plan
from halfbyte.plan.unrecognised import check_recognised, unrecognised_share
from halfbyte.source.checkpoint import Checkpoint
from small_models import DENSE_CONFIG, dense_tensors, linear, recipe, write_checkpoint


def model(folder: Path, rows: int) -> Checkpoint:
    tensors = dense_tensors()
    tensors["model.layers.0.strange.thing"] = np.ones((rows, 128), dtype=tensors["lm_head.weight"].dtype)
    return Checkpoint.open(write_checkpoint(folder, tensors, DENSE_CONFIG))


def test_a_few_are_a_note_and_many_are_refused_by_name(tmp_path: Path) -> None:
    few = make_plan(model(tmp_path / "few", 64), linear("nvfp4"))
    check_recognised(few.items)
    share = 64 * 128 / sum(item.parameters for item in few.items if len(item.weight.shape) > 1)
    assert unrecognised_share(few.items) == share < 0.1
    assert any(f"{share:.1%}" in note and "model.layers.0.strange.thing" in note for note in few.notes)
    many = make_plan(model(tmp_path / "many", 4096), linear("nvfp4"))
    with pytest.raises(PlanError, match=r"model\.layers\.0\.strange\.thing.*--allow-unrecognised"):
        check_recognised(many.items)


def test_a_matrix_that_a_rule_names_is_recognised(tmp_path: Path) -> None:
    rules = [{"match": "linear", "format": "nvfp4"}, {"match": "re:strange", "format": "nvfp4"}]
    plan = make_plan(model(tmp_path / "m", 4096), recipe(*rules))
    assert unrecognised_share(plan.items) == 0


def test_a_recipe_for_experts_says_so_of_a_dense_model(tmp_path: Path) -> None:
    rules = [{"match": "experts", "format": "mxfp4", "optional": True}, {"match": "attention", "format": "nvfp4"}]
    plan = make_plan(model(tmp_path / "m", 64), recipe(*rules))
    assert any("mixtures of experts" in note for note in plan.notes)


def test_a_plan_is_one_line_and_a_table(tmp_path: Path) -> None:
    plan = make_plan(model(tmp_path / "m", 64), linear("nvfp4"))
    assert "\n" not in repr(plan) and "test in halfbyte" in repr(plan)
    assert plan._repr_html_().count("<tr>") == 1 + len(plan.summary()["classes"])
