"""``halfbyte audit`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.small_models import DENSE_CONFIG, dense_tensors, read_file, run, write_checkpoint, write_file

from halfbyte.cli import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("audit_command")
    source = write_checkpoint(folder / "source", dense_tensors(), DENSE_CONFIG)
    run(source, folder / "out", "nvfp4", "compressed-tensors")
    return folder / "out", source


def test_a_sound_checkpoint_ends_with_0(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(folders[0]), "--against", str(folders[1])]) == 0
    assert capsys.readouterr().out.startswith("sound: nvfp4, no problem found against its source")


def test_problems_end_with_1_and_page_and_badge_are_written(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad"
    run(folders[1], bad, "nvfp4", "compressed-tensors")
    tensors = read_file(bad)
    tensors["model.layers.0.self_attn.q_proj.weight_global_scale"] *= 2
    write_file(bad / "model.safetensors", tensors)
    page, badge = tmp_path / "audit.html", tmp_path / "audit.svg"
    assert main(["audit", str(bad), "--json", "--html", str(page), "--badge", str(badge)]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [f["code"] for f in document["findings"]] == ["unequal-global-scales"]
    assert page.read_text().startswith("<!doctype html>") and badge.read_text().startswith("<svg")


def test_a_wrong_number_of_rows_is_one_sentence(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(folders[0]), "--rows", "0"]) == 2
    assert capsys.readouterr().err == "halfbyte: --rows must be at least 1, not 0\n"
