"""``halfbyte repair`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.small_models import DENSE_CONFIG, dense_tensors, read_file, run, write_checkpoint, write_file

from halfbyte.cli import main


def test_it_says_what_was_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "source", dense_tensors(), DENSE_CONFIG)
    bad = tmp_path / "bad"
    run(source, bad, "nvfp4", "compressed-tensors")
    command = ["repair", str(bad), str(tmp_path / "out"), "--against", str(source)]
    assert main(command) == 0 and "nothing that a repair can mend" in capsys.readouterr().out
    tensors = read_file(bad)
    tensors["model.layers.0.self_attn.q_proj.weight_global_scale"] *= 2
    write_file(bad / "model.safetensors", tensors)
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("before      broken: nvfp4") and lines[1].startswith("after       sound: nvfp4")
    assert main(command) == 2 and "exists already" in capsys.readouterr().err


def test_json_is_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "source", dense_tensors(), DENSE_CONFIG)
    bad = tmp_path / "bad"
    run(source, bad, "nvfp4", "compressed-tensors")
    (bad / "tokenizer.json").unlink()
    assert main(["repair", str(bad), str(tmp_path / "out"), "--against", str(source), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["repaired"] and record["files"] == ["tokenizer.json"] and len(record["unchanged_files"]) == 1
