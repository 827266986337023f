"""The worked example of docs/training.md runs as it stands, with fewer steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


@pytest.mark.slow
def test_the_worked_example_runs(tmp_path: Path) -> None:
    example = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    quick = re.sub(r"--steps \d+", "--steps 2", example).replace("--length 128", "--length 128 --max-tokens 512")
    script = f'set -e\nhalfbyte() {{ "{sys.executable}" -m halfbyte "$@"; }}\n' + quick.replace(
        "$(python", f'$("{sys.executable}"'
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HALFBYTE_CACHE": str(tmp_path / "c")}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout and (tmp_path / "trained" / "config.json").exists()
