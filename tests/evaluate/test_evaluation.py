from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import evaluate
from halfbyte.evaluate import forward as module
from small_models import linear, run

DEMO = Path(halfbyte.__file__).parent / "demo_model"


@pytest.fixture(scope="session")
def nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "nvfp4"
    run(DEMO, path, linear("nvfp4"))
    return path


@torch.no_grad()
def recipe_of_transformers(path: Path, text: str, length: int, stride: int, tokens: int) -> float:
    """Perplexity as the documentation of transformers computes it, with labels of -100 for what is context only."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :tokens]
    total = counted = previous = 0.0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + length, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -int(end - previous)] = -100
        valid = int((labels[:, 1:] != -100).sum())
        if valid:
            total += model(ids[:, begin:end], labels=labels).loss.item() * valid
            counted += valid
        previous = end
        if end == ids.shape[1]:
            break
    return math.exp(total / counted)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [64, 24])
def test_perplexity_equals_the_recipe_of_transformers(stride: int) -> None:
    (row,) = evaluate(DEMO, length=64, stride=stride, max_tokens=333)
    expected = recipe_of_transformers(DEMO, (DEMO / "heldout.txt").read_text(), 64, stride, 333)
    assert row["perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_source_has_no_divergence_from_itself(nvfp4: Path) -> None:
    rows = evaluate([DEMO, nvfp4], against=DEMO, length=64, max_tokens=256)
    assert [row["name"] for row in rows] == ["demo_model", "nvfp4"]
    assert rows[0]["kl"] == {"mean": 0.0, "median": 0.0, "p90": 0.0, "p99": 0.0, "top1": 1.0}


@pytest.mark.slow
def test_a_copy_of_the_source_loaded_on_its_own_has_none_either(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, tmp_path / name)
    row = evaluate(tmp_path, against=DEMO, length=64, max_tokens=256)[1]
    assert row["kl"] == {"mean": 0.0, "median": 0.0, "p90": 0.0, "p99": 0.0, "top1": 1.0}


@pytest.mark.slow
def test_a_row_tells_all_about_a_quantized_checkpoint(nvfp4: Path) -> None:
    source, row = evaluate(nvfp4, against=DEMO, length=64, max_tokens=1000)
    plan = halfbyte.plan(DEMO, linear("nvfp4"))
    assert row["bytes"] == plan.data_bytes and row["bits_per_weight"] == pytest.approx(plan.bits_per_weight)
    assert source["bits_per_weight"] == 16
    assert 0 < row["kl"]["median"] < row["kl"]["mean"] < row["kl"]["p90"] < row["kl"]["p99"] < 2
    assert 0.6 < row["kl"]["top1"] < 1
    assert row["perplexity"] == pytest.approx(source["perplexity"], rel=0.1)
    assert row["tokens"] == 984
    wanted = {"text": "heldout.txt", "length": 64, "stride": 64, "windows": 16, "tokens": 984, "dtype": "float32"}
    assert row["protocol"].items() >= wanted.items()
    assert row["kl_protocol"] == row["protocol"] == source["protocol"]


@pytest.mark.slow
def test_decoding_once_instead_of_in_every_pass_changes_nothing(nvfp4: Path) -> None:
    settings: dict[str, Any] = {"against": DEMO, "length": 64, "max_tokens": 256}
    kept, dense = (evaluate(nvfp4, dequantize=d, **settings)[1] for d in (False, True))
    assert kept["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-6)
    assert kept["kl"] == pytest.approx(dense["kl"], rel=1e-4)


@pytest.mark.slow
def test_the_size_of_a_batch_does_not_matter(nvfp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"against": DEMO, "length": 64, "max_tokens": 300}
    many = evaluate(nvfp4, **settings)[1]
    monkeypatch.setattr(module, "LOGITS_BYTES", 1)
    one = evaluate(nvfp4, **settings)[1]
    assert many["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)
    assert many["kl"] == pytest.approx(one["kl"], rel=1e-3)


@pytest.mark.slow
def test_progress_is_reported_in_windows() -> None:
    calls: list[tuple[int, int]] = []
    evaluate(DEMO, length=64, max_tokens=200, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (4, 4)


@pytest.mark.slow
def test_a_trained_model_has_its_published_perplexity(shared: Path) -> None:
    model, text = shared / "data/models/qwen35moe-tiny-wiki", shared / "data/text/enwiki2015/valid.txt"
    (row,) = evaluate(model, text=text, max_tokens=24 * 512)
    assert row["perplexity"] == pytest.approx(74.9, abs=0.05)


@pytest.mark.slow
def test_a_dense_model_of_another_family_agrees_with_the_recipe_of_transformers(shared: Path) -> None:
    model, text = shared / "data/models/qwen3-tiny-wiki", shared / "data/text/enwiki2015/valid.txt"
    (row,) = evaluate(model, text=text, max_tokens=3 * 512)
    expected = recipe_of_transformers(model, text.read_text()[:20_000], 512, 512, 3 * 512)
    assert row["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_checkpoints_of_other_models_are_refused(shared: Path) -> None:
    other = shared / "data" / "models" / "qwen3-tiny-wiki"
    with pytest.raises(HalfbyteError, match=r"a vocabulary of 4096 tokens, .* one of 1024"):
        evaluate(other, against=DEMO, length=64, max_tokens=128)


@pytest.mark.slow
def test_windows_longer_than_the_model_can_read_are_refused() -> None:
    with pytest.raises(HalfbyteError, match="2048 positions, so windows of 4096"):
        evaluate(DEMO, length=4096)


def test_models_without_a_text_of_their_own_need_one(shared: Path) -> None:
    with pytest.raises(HalfbyteError, match="pass one"):
        evaluate(shared / "data" / "models" / "qwen3-tiny-wiki")


@pytest.mark.parametrize("method", ["no_such_method", "gptq"])
def test_a_quantization_that_neither_reads_is_refused_in_one_sentence(method: str, tmp_path: Path) -> None:
    for file in DEMO.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((DEMO / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    # gptq needs a package that is not there
    with pytest.raises(HalfbyteError, match="neither halfbyte nor transformers can load"):
        evaluate(tmp_path, length=64, max_tokens=64)


@pytest.mark.slow
def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        run(DEMO, tmp_path / parent / "out", linear("mxfp4"))
    rows = evaluate([tmp_path / "a" / "out", tmp_path / "b" / "out"], DEMO, length=64, max_tokens=64)
    assert [row["name"] for row in rows] == ["demo_model", str(tmp_path / "a" / "out"), str(tmp_path / "b" / "out")]
    with pytest.raises(HalfbyteError, match="given twice"):
        evaluate([tmp_path / "a" / "out"] * 2, DEMO, length=64, max_tokens=64)


@pytest.mark.slow
def test_a_row_says_what_its_size_consists_of(nvfp4: Path) -> None:
    source, row = evaluate(nvfp4, DEMO, length=64, max_tokens=64)
    assert [c["storage"] for c in source["contains"]] == ["BF16"] and source["mtp"] and not source["vision"]
    assert {c["storage"]: c["quantized"] for c in row["contains"]} == {"nvfp4": True, "BF16": False}
    for r in (source, row):
        assert sum(c["bytes"] for c in r["contains"]) == r["bytes"] < r["repository_bytes"]
        assert sum(c["parameters"] for c in r["contains"]) == r["parameters"]
    assert row["repository_bytes"] == sum(p.stat().st_size for p in nvfp4.rglob("*") if p.is_file())


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(HalfbyteError, match="no checkpoint"):
        evaluate([])
