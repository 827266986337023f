"""The table of docs/architectures.md: it says what the results say, and what it says still holds."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text(encoding="utf-8"))
# one class of each way of spelling, quick to build
SAMPLE = ["Cohere2ForCausalLM", "GPTNeoXForCausalLM", "MixtralForCausalLM", "T5ForConditionalGeneration"]


@pytest.fixture(scope="module")
def survey(monkeypatch_module: pytest.MonkeyPatch) -> ModuleType:
    path = ROOT / "benchmarks" / "architectures.py"
    monkeypatch_module.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location("benchmark_architectures", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def monkeypatch_module() -> pytest.MonkeyPatch:  # type: ignore[misc]
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_the_table_is_the_one_of_the_results(survey: ModuleType) -> None:
    assert survey.table(RESULTS) in (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class_is_recognised_as_the_table_says(survey: ModuleType, name: str) -> None:
    pytest.importorskip("transformers")
    expected = next(row for row in RESULTS["rows"] if row["class"] == name)
    assert survey.row(name, expected["model_type"]) == expected


@pytest.mark.slow
def test_no_class_is_recognised_less_than_the_table_says(survey: ModuleType) -> None:
    pytest.importorskip("transformers")
    survey.quiet()
    known = survey.classes()
    less = []
    for expected in RESULTS["rows"]:
        if "share" not in expected or expected["class"] not in known:
            continue  # another release of transformers may lack the class
        row = survey.row(expected["class"], expected["model_type"])
        if "not_built" not in row and row.get("share", 0) < expected["share"] - 0.01:
            less.append((row, expected))
    assert not less
