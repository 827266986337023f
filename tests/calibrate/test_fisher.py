"""``output: fisher`` and ``refine: descent`` from text to files, alone and in the loop of ``target: residual``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.calibrate.models import dense_model
from tests.calibrate.test_residual import divergence

from halfbyte import quantize, verify
from halfbyte.calibrate.collect import CollectOptions, collect_statistics
from halfbyte.calibrate.residual import round_layers
from halfbyte.calibration.statistics import Statistics
from halfbyte.demo import MODEL
from halfbyte.errors import RecipeError
from halfbyte.plan.build import plan_to_round
from halfbyte.recipes import Recipe
from halfbyte.source.checkpoint import Checkpoint

MANY = CollectOptions(samples=64, length=64, output_hessians=True)


def recipe(**keys: Any) -> Recipe:
    rule = {"match": ["linear"], "format": "nvfp4", "rounding": "gptq", "order": "act", "if_not_divisible": "keep"}
    return Recipe.model_validate({"name": "weighed", "rules": [{**rule, **keys}]})


FISHER = recipe(output="fisher", refine="descent")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_model(tmp_path_factory.mktemp("dense") / "m")


@pytest.fixture(scope="module")
def statistics(dense: Path, demo_text: str) -> Statistics:
    return collect_statistics(dense, dense.parent / "s", [demo_text], MANY)


def test_it_lowers_the_divergence_below_that_of_gptq(
    dense: Path, statistics: Statistics, demo_text: str, tmp_path: Path
) -> None:
    found = {}
    for name, wanted in {"gptq": recipe(), "descent": recipe(refine="descent"), "fisher": FISHER}.items():
        quantize(dense, tmp_path / name, wanted, importance=statistics.folder)
        assert not verify(tmp_path / name, dense).problems
        found[name] = divergence(dense, tmp_path / name, demo_text)
    assert found["fisher"] < found["gptq"] and found["descent"] < found["gptq"], found


@pytest.mark.parametrize(("threads", "memory"), [(1, 1 << 20), (4, 2 << 30)])
def test_neither_threads_nor_memory_change_the_bytes(
    dense: Path, statistics: Statistics, tmp_path: Path, threads: int, memory: int
) -> None:
    for name, limits in {"usual": {}, "other": {"threads": threads, "memory": memory}}.items():
        quantize(dense, tmp_path / name, FISHER, importance=statistics.folder, **limits)
    for file in (tmp_path / "usual").glob("*.safetensors"):
        assert (tmp_path / "other" / file.name).read_bytes() == file.read_bytes()


def test_the_residual_loop_weighs_rows_too(dense: Path, statistics: Statistics, demo_text: str, tmp_path: Path) -> None:
    found = {}
    for name, keys in {"residual": {}, "both": {"output": "fisher", "refine": "descent"}}.items():
        wanted = recipe(target="residual", **keys)
        plan = plan_to_round(Checkpoint.open(dense), wanted, "halfbyte")
        made = round_layers(plan, wanted, tmp_path / f"{name}-s", [demo_text], MANY)
        assert not (made.folder / "gradients").exists()
        quantize(dense, tmp_path / name, wanted, importance=made.folder)
        assert not verify(tmp_path / name, dense).problems
        found[name] = divergence(dense, tmp_path / name, demo_text)
    assert found["both"] < found["residual"], found


def test_experts_are_weighed_each_by_its_own_gradients(demo_text: str, tmp_path: Path) -> None:
    few = CollectOptions(samples=8, length=64, output_hessians=True)
    made = collect_statistics(MODEL, tmp_path / "s", [demo_text], few)
    quantize(MODEL, tmp_path / "out", FISHER, importance=made.folder)
    assert not verify(tmp_path / "out", MODEL).problems


def test_statistics_without_gradients_are_refused_with_advice(dense: Path, demo_text: str, tmp_path: Path) -> None:
    plain = collect_statistics(dense, tmp_path / "s", [demo_text], CollectOptions(samples=4, length=64))
    with pytest.raises(RecipeError, match="--output-hessians"):
        quantize(dense, tmp_path / "out", FISHER, importance=plain.folder)


def test_contradictions_are_refused() -> None:
    for keys in ({"output": "fisher", "rounding": "rtn"}, {"refine": "descent", "rounding": "rtn"}):
        with pytest.raises(ValueError, match="no meaning without `rounding: gptq`"):
            recipe(**{"order": None, **keys})
    with pytest.raises(ValueError, match="awq"):
        recipe(output="fisher", transform="awq")
