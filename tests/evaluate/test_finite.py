"""Numbers that are not finite are never a measurement: models that overflow or hold a NaN, in source or checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from halfbyte.calibrate.collect import CollectOptions, collect_statistics
from halfbyte.cli import main
from halfbyte.errors import MeasurementError
from halfbyte.evaluate import Settings, TextSettings, measure, sensitivity, tensor_errors
from halfbyte.evaluate.divergence import TokenScores, divergence
from halfbyte.evaluate.emulated_activations import rounded
from halfbyte.evaluate.reference_logprobs import Cache
from halfbyte.source.checkpoint import Checkpoint
from small_models import linear, run

UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NAN, INFINITY, LARGE = 0x7FC0, 0x7F80, 0x7E80  # in BF16; the last is 8.5e37


@pytest.fixture(scope="module")
def source(shared: Path) -> Path:
    return shared / "data/models/qwen3-tiny-wiki"


@pytest.fixture(scope="module")
def text(shared: Path) -> Path:
    return shared / "data/text/enwiki2015/valid.txt"


@pytest.fixture(scope="module")
def good(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finite") / "good"
    run(source, out, linear("nvfp4"))
    return out


def broken(source: Path, out: Path, bits: int, name: str = UP) -> Path:
    """A copy of a BF16 checkpoint with one other value."""
    shutil.copytree(source, out)
    info = Checkpoint.open(out).inventory.tensors[name]
    values = np.memmap(out / info.file, np.uint16, "r+", info.offset, info.shape)
    values[(3, 5)[: len(info.shape)]] = bits
    values.flush()
    return out


def settings(text: Path, **more: Any) -> Settings:
    return Settings(text, None, 64, None, 512, **more)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [NAN, INFINITY])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_source_that_is_not_finite_ends_the_measurement_and_the_layer_is_named(
    bits: int, dtype: str, source: Path, good: Path, text: Path, tmp_path: Path
) -> None:
    bad = broken(source, tmp_path / "bad", bits)
    with pytest.raises(
        MeasurementError, match=r"bad .*first in model\.layers\.1\.mlp\.up_proj .*its weight holds a NaN"
    ):
        measure([good], bad, settings(text, dtype=dtype))


@pytest.mark.slow
def test_a_checkpoint_that_is_not_finite_is_a_row_that_is_not_valid_beside_others_that_are(
    source: Path, good: Path, text: Path, tmp_path: Path
) -> None:
    bad = broken(source, tmp_path / "bad", NAN)
    document = measure([good, bad], source, settings(text, noise_floor=True))
    first, fine, row = document["rows"]
    assert first["invalid"] is None and fine["invalid"] is None and fine["kl"]["mean"] > 0
    assert "model.layers.1.mlp.up_proj" in row["invalid"]
    assert row["perplexity"] is row["kl"] is row["kl_ci"] is row["perplexity_ratio"] is None
    assert row["indistinguishable"] == {"kl": [], "perplexity": [], "noise": None}
    assert fine["indistinguishable"]["kl"] == [] and document["noise_floor"]["invalid"] is None


@pytest.mark.slow
def test_without_a_source_every_checkpoint_is_judged_by_itself(source: Path, text: Path, tmp_path: Path) -> None:
    bad = broken(source, tmp_path / "bad", NAN)
    row, fine = measure([bad, source], None, settings(text))["rows"]
    assert row["invalid"] and row["perplexity"] is None
    assert fine["invalid"] is None and fine["perplexity"] > 1


@pytest.mark.slow
def test_numbers_that_leave_the_range_of_the_type_are_told_from_damaged_weights(
    source: Path, good: Path, text: Path, tmp_path: Path
) -> None:
    loud = scaled(source, tmp_path / "loud", 6e4)
    with pytest.raises(MeasurementError, match=r"model\.layers\.1\.mlp.* leave the range of float16; .*bfloat16"):
        measure([good], loud, settings(text, dtype="float16"))


def scaled(source: Path, out: Path, largest: float) -> Path:
    """A copy of a BF16 checkpoint with weights of this size in one matrix."""
    shutil.copytree(source, out)
    info = Checkpoint.open(out).inventory.tensors["model.layers.1.mlp.down_proj.weight"]
    values = np.memmap(out / info.file, ml_dtypes.bfloat16, "r+", info.offset, info.shape)
    wide = values.astype(np.float32)
    values[...] = wide / np.abs(wide).max() * largest
    values.flush()
    return out


@pytest.mark.slow
def test_the_command_ends_with_1_where_a_row_is_not_valid_and_says_so(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = broken(source, tmp_path / "bad", NAN)
    words = ["evaluate", str(bad), "--against", str(source), "--text", str(text), "--length", "64"]
    words += ["--max-tokens", "256", "--cache", str(tmp_path / "cache")]
    assert main(words) == 1
    shown = capsys.readouterr().out
    assert "not valid   bad gives values that are not finite" in shown and "within the noise floor" not in shown
    assert main([*words, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["rows"][1]["kl"] is None


def test_a_reference_that_is_not_finite_is_not_kept(source: Path, text: Path, good: Path, tmp_path: Path) -> None:
    bad, cache = broken(source, tmp_path / "bad", NAN), tmp_path / "cache"
    with pytest.raises(MeasurementError):
        measure([good], bad, settings(text, cache=cache))
    assert not list((cache / "references").glob("*"))


def test_stored_scores_that_are_not_finite_are_measured_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.store_scores({"a": 1}, TokenScores(np.array([1.0, math.nan]), np.zeros(2, np.int64)))
    assert cache.find_scores({"a": 1}) is None


@pytest.mark.slow
def test_tasks_of_a_checkpoint_that_is_not_finite_have_no_accuracy(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"question": "Which?", "options": ["a", "b"], "answer_index": 0}) + "\n")
    bad = broken(source, tmp_path / "bad", NAN)
    document = measure([bad], None, Settings(tasks=("mmlu_pro",), questions=questions))
    assert document["rows"][0]["tasks"] == {} and document["rows"][0]["invalid"]


@pytest.mark.slow
def test_the_sensitivity_of_a_source_that_is_not_finite_is_an_error(source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"model\.layers\.1\.mlp\.down_proj"):
        sensitivity(
            scaled(source, tmp_path / "loud", 3e38),
            linear("nvfp4"),
            tmp_path / "s.jsonl",
            TextSettings(text, length=64),
        )


def test_errors_of_a_weight_that_is_not_finite_are_an_error(source: Path, good: Path, tmp_path: Path) -> None:
    bad = broken(source, tmp_path / "bad", NAN)
    with pytest.raises(MeasurementError, match=rf"{UP} of .*bad holds a NaN or an infinity"):
        tensor_errors(good, bad)


@pytest.mark.parametrize(("name", "where"), [(UP, r"model\.layers\.1\.mlp\.up_proj"), (EMBEDDING, "embeddings")])
def test_a_calibration_notices_at_once(name: str, where: str, source: Path, text: Path, tmp_path: Path) -> None:
    bad = broken(source, tmp_path / "bad", NAN, name)
    if name == EMBEDDING:
        info = Checkpoint.open(bad).inventory.tensors[name]
        np.memmap(bad / info.file, np.uint16, "r+", info.offset, info.shape)[:, 0] = NAN
    with pytest.raises(MeasurementError, match=where):
        collect_statistics(bad, tmp_path / "statistics", [text], CollectOptions(samples=4, length=64))
    assert not (tmp_path / "statistics/layer-00001.safetensors").exists()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8"])
@pytest.mark.parametrize("scale", [None, 0.01])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rounding_does_not_make_a_finite_activation_of_one_that_is_not(
    name: str, scale: float | None, value: float
) -> None:
    x = torch.ones(2, 64)
    x[0, 3] = value
    assert not torch.isfinite(rounded(x, name, scale)[0, 3])


def test_a_divergence_from_nothing_but_nan_is_nan() -> None:
    nan, fine = torch.full((1, 4), math.nan), torch.log_softmax(torch.zeros(1, 4), 1)
    assert all(math.isnan(divergence(a, b).item()) for a, b in ((nan, fine), (fine, nan), (nan, nan)))
