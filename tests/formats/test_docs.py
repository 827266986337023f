"""docs/formats.md names what there is, and its table is the one that the benchmark recorded."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from halfbyte.formats import list_formats
from halfbyte.search import SEARCHES

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TEXT = (REPOSITORY / "docs" / "formats.md").read_text()


@pytest.mark.parametrize("name", list_formats())
def test_every_format_has_a_row_of_errors(name: str) -> None:
    _, _, codebook = TEXT.partition("<!-- table of benchmarks/formats.py -->")
    assert re.search(rf"^\|.*`{name}`.*\|$", codebook, re.MULTILINE)


@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_is_described(search: str) -> None:
    short = search.replace("four_over_six", "") if search.startswith("four_over_six_") else search
    assert f"`{short}`" in TEXT


def test_the_table_is_the_recorded_one() -> None:
    path = REPOSITORY / "benchmarks" / "formats.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_formats", path)
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    results = json.loads((REPOSITORY / "benchmarks" / "results" / "formats.json").read_text())["results"]
    assert f"{benchmark.START}\n{benchmark.table(results)}\n{benchmark.END}" in TEXT
