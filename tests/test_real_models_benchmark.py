"""The benchmark that judges whole checkpoints notices what it is there for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from small_models import MOE_CONFIG, moe_tensors, run, write_checkpoint

pytest.importorskip("torch")
pytest.importorskip("safetensors")
FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location("real_models", FOLDER / "real_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", moe_tensors(), MOE_CONFIG)


@pytest.mark.slow
def test_a_recipe_without_a_fault_has_no_problem(benchmark: Any, source: Path, tmp_path: Path) -> None:
    row = benchmark.measure(source, tmp_path, "mxfp4")
    apart = sum(name.startswith(("mtp.", "model.visual.")) for name in moe_tensors())
    assert row["problems"] == [] and row["bytes"] == row["planned_bytes"] and row["identical_tensors"] == apart
    assert 10**7 < row["quantize"]["peak_bytes"] < 10**9
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_too_much_memory_is_a_problem(
    benchmark: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "MEMORY_LIMIT", 10**6)
    problems = benchmark.measure(source, tmp_path, "mxfp4")["problems"]
    assert len(problems) == 2 and all("of memory, more than 1000000" in problem for problem in problems)


@pytest.mark.slow
def test_a_source_that_cannot_be_read_is_a_problem(benchmark: Any, tmp_path: Path) -> None:
    tensors = moe_tensors()
    tensors["lm_head.weight"][0, 0] = float("nan")
    row = benchmark.measure(write_checkpoint(tmp_path / "source", tensors, MOE_CONFIG), tmp_path, "mxfp4")
    assert len(row["problems"]) == 1 and "lm_head.weight holds a NaN" in row["problems"][0]


@pytest.mark.parametrize(
    "name", ["mtp.fc.weight", "model.visual.pos_embed.weight", "mtp.layers.0.mlp.experts.down_proj"]
)
def test_one_changed_bit_and_a_lost_tensor_are_found(benchmark: Any, source: Path, tmp_path: Path, name: str) -> None:
    changed, lost = moe_tensors(), moe_tensors()
    changed[name].view("u2").reshape(-1)[-1] ^= 1
    del lost[name]
    for kind, tensors in (("changed", changed), ("lost", lost)):
        folder = write_checkpoint(tmp_path / kind, tensors, MOE_CONFIG)
        assert benchmark.identical(source, folder)[1] == [name]


@pytest.mark.slow
def test_tensors_that_a_recipe_drops_are_no_loss(benchmark: Any, source: Path, tmp_path: Path) -> None:
    row = benchmark.measure(source, tmp_path, "makora-mixfp4")
    assert row["problems"] == [] and row["dropped_as_the_recipe_says"] == ["mtp", "vision"]
    run(source, tmp_path / "text", "makora-mixfp4")
    assert benchmark.identical(source, tmp_path / "text")[0] == 0
