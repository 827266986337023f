from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(demo_model: str, tmp_path: Path) -> str:
    path = tmp_path / "short.txt"
    path.write_text((Path(demo_model) / "heldout.txt").read_text(encoding="utf-8")[:800], encoding="utf-8")
    return str(path)


@pytest.mark.slow
def test_rows_have_perplexity_and_divergence_from_the_source(
    run_json: Callable[..., Any], demo_model: str, quantized: str, text: str
) -> None:
    pytest.importorskip("torch")
    options = ("--text", text, "--length", "64", "--stride", "32")
    found = run_json("evaluate", quantized, "--against", demo_model, *options)
    source, row = found["rows"]
    assert source["path"] == demo_model and source["kl"]["mean"] == 0
    assert row["path"] == quantized and 0 < row["kl"]["mean"] < 0.5
    assert 0.5 < row["kl"]["top1"] <= 1
    assert row["protocol"]["stride"] == 32 and row["protocol"]["text"] == "short.txt"
    assert found["noise_floor"]["dtype"] == "bfloat16" and found["source"] == source["name"]
    assert row["recipe"] == "mxfp4" and row["contains"][0]["storage"] in ("mxfp4", "BF16")


@pytest.mark.slow
def test_text_output_is_a_table_and_states_the_protocol(
    run_text: Callable[..., str], demo_model: str, text: str
) -> None:
    pytest.importorskip("torch")
    lines = run_text("evaluate", demo_model, "--text", text, "--length", "64", "--max-tokens", "100").splitlines()
    assert lines[0].split()[:2] == ["checkpoint", "size"]
    assert lines[2].split()[0] == "demo_model"
    assert lines[-1].startswith("short.txt: 98 tokens scored in 2 windows of 64")


@pytest.mark.slow
def test_a_file_gets_the_same_document_and_the_table_names_the_noise_floor(
    run_text: Callable[..., str], demo_model: str, quantized: str, text: str, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "results.json"
    options = ("--text", text, "--length", "32", "--activations", "nvfp4", "--errors", "-o", str(out))
    shown = run_text("evaluate", quantized, "--against", demo_model, *options)
    found = json.loads(out.read_text())
    assert (found["halfbyte"], found["version"]) == ("results", 1)
    assert found["rows"][1]["activations"] == "nvfp4"
    assert found["rows"][1]["errors"]["halfbyte"] == "errors"
    assert "mxfp4 + nvfp4 activations" in shown
    assert "noise floor: the source in bfloat16 against itself in float32" in shown


@pytest.mark.slow
def test_presets_settle_the_windows(run_json: Callable[..., Any], demo_model: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    rows = tmp_path / "rows.raw"
    rows.write_text("\n".join([" = Title = ", "", "first row of text here", " ", "second row"] * 40))
    joined = tmp_path / "joined.txt"
    joined.write_text("\n\n".join([" = Title = ", "first row of text here", "second row"] * 40))
    (one,) = run_json("evaluate", demo_model, "--text", str(rows), "--protocol", "wikitext2")["rows"]
    (other,) = run_json("evaluate", demo_model, "--text", str(joined), "--length", "2048")["rows"]
    assert one["protocol"]["preset"] == "wikitext2" and one["protocol"]["length"] == one["protocol"]["stride"] == 2048
    assert one["protocol"]["sha256"] == other["protocol"]["sha256"] and one["perplexity"] == other["perplexity"]
    (chunks,) = run_json("evaluate", demo_model, "--text", str(rows), "--protocol", "chunks-512")["rows"]
    assert chunks["protocol"]["length"] == chunks["protocol"]["stride"] == 512


def test_a_preset_and_windows_of_one_s_own_exclude_each_other(
    refusal: Callable[..., str], demo_model: str, text: str
) -> None:
    pytest.importorskip("torch")
    said = refusal("evaluate", demo_model, "--text", text, "--protocol", "wikitext2", "--length", "64")
    assert "leave them out" in said


def test_without_torch_the_install_command_is_named(
    monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str], demo_model: str, text: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'halfbyte[transformers]'" in refusal("evaluate", demo_model, "--text", text)


def test_without_the_harness_the_install_command_is_named(
    monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str], demo_model: str
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'halfbyte[eval]'" in refusal("evaluate", demo_model, "--tasks", "mmlu_pro", "--questions", "x")


def test_at_least_one_checkpoint_is_needed(refusal: Callable[..., str]) -> None:
    assert "PATH" in refusal("evaluate")


def test_errors_are_shown_per_class_or_per_weight_and_written(
    run_text: Callable[..., str], run_json: Callable[..., Any], demo_model: str, quantized: str, tmp_path: Path
) -> None:
    out = tmp_path / "errors.json"
    shown = run_text("errors", quantized, "--against", demo_model, "-o", str(out))
    found = run_json("errors", quantized, "--against", demo_model)
    assert json.loads(out.read_text())["total"] == found["total"]
    assert f"not quantized: {found['kept']['weights']} weights" in shown
    assert "experts.gate_up" in shown
    lines = run_text("errors", quantized, "--against", demo_model, "--weights").splitlines()
    worst = max(found["weights"], key=lambda w: w["relmse"])
    assert lines[2].split()[0] == worst["name"] and len(lines) == len(found["weights"]) + 6


def test_errors_need_no_torch(
    monkeypatch: pytest.MonkeyPatch, run_json: Callable[..., Any], demo_model: str, quantized: str
) -> None:
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run_json("errors", quantized, "--against", demo_model)["total"]["relmse"] > 0


@pytest.mark.slow
def test_sensitivity_lists_the_worst_group_first_and_names_its_file(
    run_text: Callable[..., str], demo_model: str, text: str, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "s.jsonl"
    options = ("--text", text, "--length", "64", "--max-tokens", "64", "--recipe", "mxfp4", "--by", "role")
    lines = run_text("sensitivity", demo_model, *options, "-o", str(out)).splitlines()
    groups = [json.loads(line) for line in out.read_text().splitlines()][1:]
    worst = max(groups[:-1], key=lambda group: group["kl"]["mean"])
    assert lines[2].split()[0] == worst["group"]
    assert any(line == f"written to {out}" for line in lines)
