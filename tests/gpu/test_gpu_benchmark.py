"""benchmarks/gpu.py: the same code in Triton's interpreter, and one sentence without a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_part_runs_in_the_interpreter(tmp_path: Path) -> None:
    done = run(tmp_path / "gpu.json", "--smoke")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["failed"] == {} and document["left_out"] == []
    errors = {key: error for key, error in document["correctness"].items() if not isinstance(error, str)}
    assert len(errors) > 20 and max(errors.values()) < 1e-3
    assert document["mixtures_correct"]["same_bits"] and document["summary"] == {"not_measured": "no CUDA device"}


@pytest.mark.slow
def test_without_a_device_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    done = run(tmp_path / "gpu.json")
    assert done.returncode == 1 and "there is no CUDA device here" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "gpu.json").exists()
