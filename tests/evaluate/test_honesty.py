"""What an evaluator must not get wrong: nothing where there is nothing, and much where a checkpoint is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte
from halfbyte.evaluate import evaluate, tensor_errors
from halfbyte.evaluate.evaluation import Settings, measure
from halfbyte.source.checkpoint import Checkpoint
from small_models import linear, run

MEASURE: dict[str, Any] = {"length": 128, "max_tokens": 1024}
LAYER = "model.layers.1."


@pytest.fixture(scope="module")
def source(shared: Path) -> Path:
    return shared / "data/models/qwen35moe-tiny-wiki"


@pytest.fixture(scope="module")
def text(shared: Path) -> Path:
    return shared / "data/text/enwiki2015/valid.txt"


@pytest.fixture(scope="module")
def good(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("honesty") / "good"
    run(source, out, linear("nvfp4"))
    return out


def damage(good: Path, out: Path, change: Callable[[str, np.memmap[Any, Any]], None]) -> Path:
    """A copy with other bytes in some tensors; ``change`` gets a name and the bytes of its tensor to write to."""
    shutil.copytree(good, out)
    for info in Checkpoint.open(out).inventory.tensors.values():
        content = np.memmap(out / info.file, np.uint8, "r+", info.offset, info.nbytes)
        change(info.name, content.reshape(info.shape[0], -1) if info.shape else content)
        content.flush()
    return out


def zero_a_layer(name: str, content: Any) -> None:
    if name.startswith(LAYER) and name.endswith("_codes"):
        content[...] = 0


def swap_experts(name: str, content: Any) -> None:
    if name.startswith(LAYER) and ".experts." in name:
        content[[0, 1, 2, 3]] = content[[1, 0, 3, 2]]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "times"), [(zero_a_layer, 10), (swap_experts, 2)])
def test_a_damaged_checkpoint_is_flagged_by_verify_by_its_errors_and_by_its_divergence(
    change: Callable[..., None], times: int, source: Path, good: Path, text: Path, tmp_path: Path
) -> None:
    bad = damage(good, tmp_path / "bad", change)
    assert halfbyte.verify(good, source).ok
    found = halfbyte.verify(bad, source)
    assert not found.ok and all(LAYER in problem or "SHA-256" in problem for problem in found.problems)
    errors = tensor_errors(bad, source)
    hurt = {w["name"] for w in errors["weights"] if w["relmse"] > 0.05}
    assert hurt and all(name.startswith(LAYER) for name in hurt)
    _, fine, broken = evaluate([good, bad], source, text, **MEASURE)
    assert broken["kl"]["mean"] > times * fine["kl"]["mean"]
    assert broken["kl_ci"]["mean"][0] > fine["kl_ci"]["mean"][1]
    assert broken["indistinguishable"]["kl"] == fine["indistinguishable"]["kl"] == []


def test_the_expert_that_is_wrong_is_named(source: Path, good: Path, tmp_path: Path) -> None:
    errors = tensor_errors(damage(good, tmp_path / "bad", swap_experts), source)
    experts = next(w["experts"] for w in errors["weights"] if w["name"] == f"{LAYER}mlp.experts.down_proj")
    assert [i for i, relmse in enumerate(experts) if relmse > 1] == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_noise_floor_lies_between_nothing_and_quantization(source: Path, good: Path, text: Path) -> None:
    found = measure(good, source, Settings(text=text, noise_floor=True, **MEASURE))
    original, row = found["rows"]
    assert original["kl"] == {"mean": 0.0, "median": 0.0, "p90": 0.0, "p99": 0.0, "top1": 1.0}
    assert 0 < found["noise_floor"]["kl"]["mean"] < row["kl"]["mean"] / 3
    assert row["indistinguishable"]["noise"] is False


@pytest.mark.slow
def test_a_difference_within_noise_is_called_that(source: Path, good: Path, text: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(good, tmp_path / "twin"))
    run(source, tmp_path / "fp8", linear("fp8_channel"))
    settings = Settings(text=text, noise_floor=True, **MEASURE)
    rows = {row["name"]: row for row in measure([good, twin, tmp_path / "fp8"], source, settings)["rows"]}
    assert rows["good"]["kl"] == rows["twin"]["kl"]
    assert rows["good"]["indistinguishable"]["kl"] == ["twin"] and rows["twin"]["indistinguishable"]["kl"] == ["good"]
    assert rows["fp8"]["indistinguishable"]["kl"] == []
    assert "twin" in rows["good"]["indistinguishable"]["perplexity"]
    low, high = rows["fp8"]["perplexity_ratio"]["ci"]
    assert ("qwen35moe-tiny-wiki" in rows["fp8"]["indistinguishable"]["perplexity"]) == (low <= 1 <= high)
