"""``halfbyte calibrate`` beside collecting: what it writes for llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from halfbyte.calibration import match_importance, read_importance
from halfbyte.cli import main
from halfbyte.demo import MODEL
from halfbyte.source.checkpoint import Checkpoint
from invented import invented_statistics


@pytest.mark.parametrize("file", ["imatrix.gguf", "imatrix.dat"])
def test_statistics_become_an_importance_file_of_llama_cpp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    if file.endswith("gguf"):
        pytest.importorskip("gguf")
    statistics = invented_statistics(tmp_path / "statistics")
    assert main(["calibrate", str(MODEL), str(statistics), "--imatrix", str(tmp_path / file)]) == 0
    assert "entries under llama.cpp's names" in capsys.readouterr().out
    source = Checkpoint.open(MODEL)
    back = match_importance(read_importance(tmp_path / file), source.weights, source.inventory.config)
    known = read_importance(statistics)
    covered = [name for name in back.values if name in known.values]
    assert len(covered) > 20 and not back.unmatched
    for name in covered:
        reached = np.atleast_1d(known.counts[name]) > 0
        mine, theirs = np.atleast_2d(back.values[name])[reached], np.atleast_2d(known.values[name])[reached]
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_merging_cannot_name_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(invented_statistics(tmp_path / name)) for name in "ab"]
    command = ["calibrate", *folders, "--merge", str(tmp_path / "c"), "--imatrix", str(tmp_path / "i.dat")]
    assert main(command) == 2
    assert "merge first" in capsys.readouterr().err and not (tmp_path / "i.dat").exists()
