"""What ``make test-engines`` installs and runs covers every test that is skipped where an engine is missing."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "scripts" / "test_engines.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("script_of_engines", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_engine_has_requirements_that_pin_it(script: ModuleType) -> None:
    assert {path.stem for path in script.REQUIREMENTS.glob("*.txt")} == set(script.ENGINES)
    for name, engine in script.ENGINES.items():
        text = (script.REQUIREMENTS / f"{name}.txt").read_text()
        assert re.search(rf"^{re.escape(engine.package)}==\S+$", text, re.MULTILINE), name


def test_every_test_file_that_is_skipped_without_an_engine_is_run_with_it(script: ModuleType) -> None:
    for engine in script.ENGINES.values():
        skips = re.compile(rf"""^(?:\w+ = )?pytest\.importorskip\("{engine.module}\"""", re.MULTILINE)
        files = (path for path in (REPOSITORY / "tests").rglob("*.py") if skips.search(path.read_text()))
        skipped = {str(path.relative_to(REPOSITORY)) for path in files}
        assert skipped and skipped <= set(engine.tests)
        assert all((REPOSITORY / path).is_file() for path in engine.tests)


def test_an_unknown_engine_is_refused_before_anything_is_installed() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "gguf2000"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown engine 'gguf2000'; there are mlx, llamacpp, modelopt, llmcompressor, vllm" in done.stderr
