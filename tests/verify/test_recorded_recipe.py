"""Outputs without checksums are made again by the recipe that they record, and compared byte by byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.recorded_recipe import recorded_plan
from halfbyte.verify.weights import verify
from small_models import DENSE_CONFIG, dense_tensors, linear, read_file, run, without_checksums, write_checkpoint
from small_models import write_file as write_tensors

RECORD: dict[str, Any] = {
    "halfbyte": 2,
    "source": {},
    "dialect": "halfbyte",
    "recipe": {"name": "r", "rules": [{"match": "linear", "format": "nvfp4"}]},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "dense", dense_tensors(), DENSE_CONFIG)


def made(source: Path, out: Path, dialect: str = "halfbyte", **more: Any) -> Path:
    run(source, out, linear("nvfp4"), dialect, **more)
    return without_checksums(out)


def test_the_plan_is_made_from_what_is_recorded(dense: Path) -> None:
    plan = recorded_plan(RECORD, Checkpoint.open(dense))
    assert plan is not None
    assert (plan.dialect.name, plan.recipe.name, len(plan.shards)) == ("halfbyte", "r", 1)


@pytest.mark.parametrize(
    "change",
    [
        {"halfbyte": 1},
        {"halfbyte": 3},
        {"importance": {"name": "i"}},
        {"dialect": "none"},
        {"recipe": {"rules": "no"}},
        {"recipe": {"name": "r", "rules": [{"match": "re:no_such_weight", "format": "nvfp4"}]}},
    ],
)
def test_what_cannot_be_made_again_has_no_plan(dense: Path, change: dict[str, Any]) -> None:
    assert recorded_plan(RECORD | change, Checkpoint.open(dense)) is None


@pytest.mark.parametrize("dialect", ["halfbyte", "compressed-tensors", "modelopt"])
def test_an_output_is_what_its_recipe_gives(dense: Path, tmp_path: Path, dialect: str) -> None:
    result = verify(made(dense, tmp_path / "out", dialect), dense)
    assert result.ok and result.recomputed


def test_several_files_are_compared_with_the_one_that_is_planned(dense: Path, tmp_path: Path) -> None:
    result = verify(made(dense, tmp_path / "out", max_shard_bytes=50_000), dense)
    assert result.ok and result.recomputed and len(list((tmp_path / "out").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("at", [0, 1000, -1])
def test_a_code_that_is_as_good_but_not_the_recipe_s_is_found(dense: Path, tmp_path: Path, at: int) -> None:
    out, name = made(dense, tmp_path / "out"), "model.layers.1.mlp.up_proj.weight_codes"
    tensors = read_file(out)
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[at] ^= 1  # one step of one weight
    write_tensors(out / "model.safetensors", tensors)
    assert verify(out, dense).problems == [f"{name} is not what the recorded recipe gives"]


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_settings_that_the_recipe_does_not_give_are_found(dense: Path, tmp_path: Path) -> None:
    out = made(dense, tmp_path / "out", "compressed-tensors")
    edited(out / "config.json", lambda config: config["quantization_config"].update(quantization_status="frozen"))
    assert "the quantization_config of config.json is not what the recorded recipe gives" in verify(out, dense).problems


def test_further_files_of_the_dialect_are_compared(dense: Path, tmp_path: Path) -> None:
    out, name = made(dense, tmp_path / "out", "modelopt"), "hf_quant_config.json"
    edited(out / name, lambda content: content["quantization"].update(group_size=32))
    assert f"{name} is not what the recorded recipe gives" in verify(out, dense).problems
    (out / name).unlink()
    assert f"{name} is missing" in verify(out, dense).problems


def test_an_unused_value_of_a_scale_is_found_too(dense: Path, tmp_path: Path) -> None:
    out, name = made(dense, tmp_path / "out"), "model.layers.0.self_attn.o_proj.weight_tensor_scale"
    tensors = read_file(out)
    tensors[name] = np.nextafter(tensors[name], np.float32(1))
    write_tensors(out / "model.safetensors", tensors)
    assert verify(out, dense).problems == [f"{name} is not what the recorded recipe gives"]
