"""The sample that scales are chosen on: spread over a weight, of whole tiles, bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from folded import plan_with
from halfbyte.convert import smoothing_search as fold_search
from halfbyte.convert.conversion import convert, source_bytes
from halfbyte.convert.smoothing_search import _runs, sample_bytes
from halfbyte.plan import resources
from halfbyte.source.smoothing import SMOOTHING_FILE, read_scales
from halfbyte.verify.weights import verify
from small_models import MOE_CONFIG, hashes, moe_tensors, write_checkpoint


@pytest.mark.parametrize("tile", [1, 128])
@pytest.mark.parametrize(("rows", "wanted"), [(100_000, 512), (4096, 4000), (640, 130), (100, 512), (1000, 3)])
def test_runs_of_rows_are_spread_and_bounded(rows: int, wanted: int, tile: int) -> None:
    runs = _runs(rows, wanted, tile)
    assert all(0 <= a < b <= rows and a % tile == 0 for a, b in runs) and len(runs) <= 16
    assert sum(b - a for a, b in runs) <= max(wanted, tile)
    if wanted >= 16 * tile and rows > wanted:
        assert len(runs) == 16 and runs[0][0] == 0 and runs[-1][1] > rows - 2 * tile


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "moe", moe_tensors(), MOE_CONFIG)


def test_scales_chosen_on_a_sample_fit_all_experts_and_rows(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def noted(consumers: Any, *args: Any, **more: Any) -> Any:
        sizes.extend(consumer.weight.size for consumer in consumers)
        return original(consumers, *args, **more)

    original = fold_search.choose_scale
    monkeypatch.setattr(fold_search, "choose_scale", noted)
    monkeypatch.setattr(fold_search, "SAMPLE", 4096)
    monkeypatch.setattr(fold_search, "_RUNS", 2)
    convert(plan_with(moe), tmp_path / "out", threads=1)
    assert max(sizes) == 4096
    scales = read_scales(tmp_path / "out" / SMOOTHING_FILE)
    assert scales["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 128)
    assert verify(tmp_path / "out", moe).ok


def test_kept_weights_are_smoothed_alike_in_slices_of_any_size(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(plan_with(moe), tmp_path / "large", threads=1)
    monkeypatch.setattr(resources, "SLICE_BYTES", 100)
    convert(plan_with(moe), tmp_path / "small", threads=1)
    assert hashes(tmp_path / "small") == hashes(tmp_path / "large")


def test_progress_counts_the_choice_too(moe: Path, tmp_path: Path) -> None:
    plan, seen = plan_with(moe), [0]

    def report(count: int) -> None:
        seen[0] += count

    convert(plan, tmp_path / "out", threads=1, progress=report)
    assert sample_bytes(plan) > 0 and seen[0] == source_bytes(plan)
