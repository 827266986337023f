from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import halfbyte.demo


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two recipes and a short text: the demo in seconds."""
    path = tmp_path / "short.txt"
    path.write_text(halfbyte.demo.TEXT.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    monkeypatch.setattr(halfbyte.demo, "TEXT", path)
    monkeypatch.setattr(halfbyte.demo, "RECIPES", ("mxfp4", "nvfp4-absmax"))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_rows_compare_size_error_perplexity_and_divergence(run_json: Callable[..., Any]) -> None:
    pytest.importorskip("torch")
    found = run_json("demo")
    assert [row["recipe"] for row in found["rows"]] == ["mxfp4", "nvfp4-absmax"]
    for row in found["rows"]:
        assert row["bytes"] < found["source"]["bytes"] and row["bits_per_weight"] < 8
        assert 0 < row["relmse"] < 0.02 and row["verified"] is True
        assert row["perplexity"] > 1 and 0 < row["kl"] < 1 and 0.5 < row["top1"] <= 1
    assert found["source"]["perplexity"] > 1
    assert found["note"] == ""


@pytest.mark.usefixtures("small")
def test_without_torch_everything_but_perplexity_is_shown(
    monkeypatch: pytest.MonkeyPatch, run_json: Callable[..., Any], run_text: Callable[..., str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = run_json("demo")
    assert found["rows"][0]["relmse"] > 0 and found["rows"][0]["perplexity"] is None
    assert "pip install 'halfbyte[transformers]'" in found["note"]
    text = run_text("demo")
    assert text.splitlines()[0].split() == ["recipe", "size", "bits/weight", "relMSE"]
    assert "pip install 'halfbyte[transformers]'" in text
    assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.usefixtures("small")
def test_outputs_can_be_kept(monkeypatch: pytest.MonkeyPatch, run_text: Callable[..., str], tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert f"kept in {tmp_path / 'kept'}" in run_text("demo", "--keep", str(tmp_path / "kept"))
    assert (tmp_path / "kept" / "mxfp4" / "config.json").is_file()


@pytest.mark.slow
def test_each_recipe_has_a_smaller_error_than_the_one_before(
    monkeypatch: pytest.MonkeyPatch, run_json: Callable[..., Any]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    rows = run_json("demo")["rows"]
    names = ["mxfp4", "nvfp4-absmax", "nvfp4-four-over-six", "nvfp4", "mixfp4-absmax", "mixfp4"]
    assert [row["recipe"] for row in rows] == names
    errors = [row["relmse"] for row in rows]
    assert errors == sorted(errors, reverse=True)
