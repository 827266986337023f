"""The tables of docs/methods.md are the ones that the benchmarks recorded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TEXT = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["gptq", "rotation"])
def test_the_table_is_the_recorded_one(name: str) -> None:
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location(f"benchmark_of_{name}", REPOSITORY / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    results = json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert f"{benchmark.START}\n\n{benchmark.table(results)}\n\n{benchmark.END}" in TEXT
