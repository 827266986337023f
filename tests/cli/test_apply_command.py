"""``halfbyte apply`` says what is wrong with a patch."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.small_models import DENSE_CONFIG, dense_tensors, write_checkpoint

from halfbyte.cli import main


def test_a_checkpoint_is_no_patch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_checkpoint(tmp_path / "source", dense_tensors(), DENSE_CONFIG))
    assert main(["apply", folder, folder, str(tmp_path / "out")]) == 2
    assert "is no patch; `halfbyte diff BASE TUNED -o FILE` makes one" in capsys.readouterr().err
