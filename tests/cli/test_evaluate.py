from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def text(demo_model: str, tmp_path: Path) -> str:
    path = tmp_path / "short.txt"
    path.write_text((Path(demo_model) / "heldout.txt").read_text(encoding="utf-8")[:800], encoding="utf-8")
    return str(path)


def test_rows_have_perplexity_and_divergence_from_the_source(
    run_json: Callable[..., Any], demo_model: str, quantized: str, text: str
) -> None:
    pytest.importorskip("torch")
    options = ("--text", text, "--length", "64", "--stride", "32")
    source, row = run_json("evaluate", quantized, "--against", demo_model, *options)["rows"]
    assert source["path"] == demo_model and source["kl"]["mean"] == 0
    assert row["path"] == quantized and 0 < row["kl"]["mean"] < 0.5
    assert 0.5 < row["kl"]["top1"] <= 1
    assert row["protocol"]["stride"] == 32 and row["protocol"]["text"] == "short.txt"


def test_text_output_is_a_table_and_states_the_protocol(
    run_text: Callable[..., str], demo_model: str, text: str
) -> None:
    pytest.importorskip("torch")
    lines = run_text("evaluate", demo_model, "--text", text, "--length", "64", "--max-tokens", "100").splitlines()
    assert lines[0].split()[:2] == ["checkpoint", "size"]
    assert lines[2].split()[0] == "demo_model"
    assert lines[-1].startswith("short.txt: 98 tokens scored in 2 windows of 64")


def test_without_torch_the_install_command_is_named(
    monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str], demo_model: str, text: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'halfbyte[transformers]'" in refusal("evaluate", demo_model, "--text", text)


def test_at_least_one_checkpoint_is_needed(refusal: Callable[..., str]) -> None:
    assert "PATH" in refusal("evaluate")
