"""The tables of docs/accuracy.md are the ones that the benchmarks recorded."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BENCHMARKS = REPOSITORY / "benchmarks"
RESULTS = BENCHMARKS / "results"
TEXT = (REPOSITORY / "docs" / "accuracy.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def _is_recorded(name: str, table: str) -> bool:
    inside = TEXT.split(f"<!-- begin: {name} -->")[1].split(f"<!-- end: {name} -->")[0]
    return inside.strip() == table.strip()


def _benchmark(name: str) -> ModuleType:
    """A module of benchmarks/ whose name a package of the tests has too."""
    spec = spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _documents(name: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / name).glob("*.json"))]


@pytest.mark.parametrize("name", ["gptq", "rotation", "soar"])
def test_the_table_is_the_recorded_one(name: str) -> None:
    pytest.importorskip("transformers")
    results = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert _is_recorded(name, import_module(name).table(results))


def test_the_tables_of_calibration_methods_are_the_recorded_ones() -> None:
    pytest.importorskip("transformers")
    bench, tables = _benchmark("calibration"), import_module("calibration_tables")
    found = tables.tables(
        _documents("calibration"), bench.FORMATS, bench.METHODS, bench.STUDY, bench.TOKENS, tuple(bench.W4A4)
    )
    assert [name for name, table in found.items() if not _is_recorded(name, table)] == []


def test_the_tables_of_allocation_are_the_recorded_ones() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("highspy")
    bench, tables = import_module("allocation"), import_module("allocation_tables")
    found = tables.tables(_documents("allocation"), list(bench.HAND))
    assert [name for name, table in found.items() if not _is_recorded(name, table)] == []
