"""``halfbyte diff`` and ``apply`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.small_models import DENSE_CONFIG, dense_tensors, hashes, run, write_checkpoint

from halfbyte.cli import main


@pytest.mark.slow
def test_a_patch_is_made_and_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("base", 0), ("tuned", 1)):
        source = write_checkpoint(tmp_path / f"{name}-source", dense_tensors(seed), DENSE_CONFIG)
        run(source, tmp_path / name, "nvfp4", "compressed-tensors")
    base, tuned, patch, out = (str(tmp_path / name) for name in ("base", "tuned", "p.safetensors", "out"))
    assert main(["diff", base, tuned, "-o", patch]) == 0
    assert "tensors differ" in capsys.readouterr().out
    assert main(["apply", base, patch, out, "--json"]) == 0
    assert "config.json" in json.loads(capsys.readouterr().out)["files"]
    assert hashes(Path(out)) == hashes(Path(tuned))


def test_a_patch_ends_in_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(tmp_path), str(tmp_path), "-o", str(tmp_path / "p.bin")]) == 2
    assert "should end in .safetensors" in capsys.readouterr().err
