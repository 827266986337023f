"""Without halfbyte, transformers does not load its dialect at all: no model of random numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import halfbyte

DEMO = Path(halfbyte.__file__).parent / "demo_model"


@pytest.mark.slow
def test_stock_transformers_refuses_the_dialect_and_says_what_is_missing(tmp_path: Path) -> None:
    halfbyte.quantize(DEMO, tmp_path / "out", "mixfp4")
    code = f"import transformers as t; t.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "pip install halfbyte and import halfbyte.transformers" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", f"import halfbyte.transformers; {code}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_key_does_not_travel_into_other_dialects(tmp_path: Path) -> None:
    halfbyte.quantize(DEMO, tmp_path / "out", "mxfp4")
    halfbyte.convert(tmp_path / "out", tmp_path / "other", "compressed-tensors")
    assert "transformers_weights" in (tmp_path / "out/config.json").read_text()
    assert "transformers_weights" not in (tmp_path / "other/config.json").read_text()
