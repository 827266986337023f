"""``halfbyte train``: its options and what it prints; tests/train runs it on models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from halfbyte.cli import main
from halfbyte.demo import MODEL, TEXT
from small_models import run


@pytest.mark.slow
def test_a_training_is_described_on_the_terminal_and_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(MODEL, tmp_path / "start", "mxfp4")
    common = ["--start", str(tmp_path / "start"), "--text", str(TEXT), "--length", "32", "--steps", "2", "--answers"]
    assert main(["train", str(MODEL), str(tmp_path / "a"), *common, "1"]) == 0
    shown = capsys.readouterr().out
    assert "2 steps, 64 tokens" in shown and "held-out loss" in shown and "reach 64" in shown
    assert main(["train", str(MODEL), str(tmp_path / "b"), *common, "0", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["steps"] == 2 and document["method"] == "distill" and set(document["held_out"]) == {"0", "1", "2"}


@pytest.mark.parametrize("rate", ["0", "-1", "inf", "fast"])
def test_a_rate_is_a_positive_number(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "a", "b", "--start", "c", "--text", "d", "--rate", rate]) == 2
    assert "is no positive number" in capsys.readouterr().err


@pytest.mark.slow
def test_a_local_training_shows_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(MODEL, tmp_path / "start", "mxfp4")
    common = ["train", str(MODEL), str(tmp_path / "out"), "--start", str(tmp_path / "start"), "--text", str(TEXT)]
    common += ["--length", "32", "--steps", "3", "--method", "local"]
    assert main([*common, "--top-k", "5"]) == 2 and "has no --top-k" in capsys.readouterr().err
    assert main(common) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("layer 3: held-out error")]
