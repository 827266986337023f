"""What loads where: the tables in the documents are those of engine_facts.yaml, which does not contradict itself."""

from __future__ import annotations

import importlib.util
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import pytest

from halfbyte.compatibility.engine_facts import Engine, Load, engines
from halfbyte.dialects import list_dialects
from halfbyte.formats import list_formats

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LOADS = [pytest.param(e, load, id=f"{e.name}-{i}") for e in engines() for i, load in enumerate(e.loads)]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_tables", REPOSITORY / "scripts" / "engine_tables.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("path", ["docs/engines.md", "README.md"])
def test_the_tables_are_current(tables: ModuleType, path: str) -> None:
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    assert text == tables.current(path, text), "run python scripts/engine_tables.py"


@pytest.mark.slow
def test_a_table_that_changed_is_noticed(tables: ModuleType) -> None:
    text = (REPOSITORY / "docs/engines.md").read_text(encoding="utf-8")
    changed = text.replace("| MixFP4 |", "| MixFP5 |")
    assert changed != text == tables.current("docs/engines.md", changed)


@pytest.mark.parametrize(("engine", "load"), LOADS)
def test_a_load_names_dialects_and_formats_that_exist(engine: Engine, load: Load) -> None:
    assert load.dialect in {dialect.name for dialect in list_dialects()} & set(engine.reads)
    for pattern in load.formats:
        assert any(fnmatchcase(name, pattern) for name in list_formats()), pattern
    assert load.version or engine.name == "halfbyte"


@pytest.mark.parametrize(("engine", "load"), LOADS)
def test_nothing_is_said_to_load_that_is_known_not_to(engine: Engine, load: Load) -> None:
    """Facts about experts or a kind of hardware need a restriction, all others exclude each other."""
    for fact in engine.facts:
        if fact.effect not in ("wrong", "refuses") or (fact.dialects and load.dialect not in fact.dialects):
            continue
        formats = [f for f in list_formats() if any(fnmatchcase(f, p) for p in (fact.formats or ("*",)))]
        both = [f for f in formats if engine.load(load.dialect, f) is load]
        assert not both or load.where or fact.families or fact.mixed, (fact.what, both)


def test_every_dialect_has_an_engine() -> None:
    assert {load.dialect for engine in engines() for load in engine.loads} == {d.name for d in list_dialects()}
