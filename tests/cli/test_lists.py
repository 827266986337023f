"""``recipes`` and ``formats``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfbyte import list_formats, list_recipes


def test_all_recipes_are_listed(run_json: Callable[..., Any], run_text: Callable[..., str]) -> None:
    found = run_json("recipes")
    assert [r["name"] for r in found["recipes"]] == list(list_recipes())
    assert "NVFP4 for all Linear weights" in run_text("recipes")


def test_one_recipe_shows_its_rules(run_json: Callable[..., Any], run_text: Callable[..., str]) -> None:
    assert run_json("recipes", "mixfp4")["rules"][0]["format"] == "mixfp4"
    text = run_text("recipes", "nvfp4-fp8")
    assert "fp8_channel" in text and "may match nothing" in text


def test_a_recipe_file_is_checked(refusal: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rules:\n  - {match: experts, fromat: nvfp4}\n")
    assert "unknown key 'fromat'; nearest: format" in refusal("recipes", str(path))


def test_all_formats_are_listed_with_their_dialects(run_json: Callable[..., Any]) -> None:
    found = run_json("formats")
    formats = {f["name"]: f for f in found["formats"]}
    assert list(formats) == list_formats()
    assert {"compressed-tensors", "halfbyte"} <= set(formats["nvfp4"]["dialects"])
    assert round(formats["mxfp4"]["bits_per_weight"], 3) == 4.25
    assert {d["name"] for d in found["dialects"]} >= {"halfbyte", "compressed-tensors"}
    assert "four_over_six" in {s["name"] for s in found["searches"]}


def test_formats_as_text(run_text: Callable[..., str]) -> None:
    text = run_text("formats")
    assert any(line.split()[:2] == ["nvfp4", "4.5"] for line in text.splitlines())
