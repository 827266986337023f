"""Tests are found by name: a module's lie in the file of its name, or docs/testing.md says where."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "src" / "halfbyte"
HEADING = "## Modules whose tests have another name"


def modules_without_own_file() -> set[str]:
    modules = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.name.startswith("__"))
    return {m.as_posix() for m in modules if not (REPOSITORY / "tests" / m.parent / f"test_{m.name}").is_file()}


def table() -> dict[str, list[str]]:
    """Module, and the test files that docs/testing.md names for it."""
    section = (REPOSITORY / "docs" / "testing.md").read_text().split(HEADING)[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    listed = [(re.findall(r"`([^`]+)`", modules), re.findall(r"`([^`]+)`", tests)) for modules, tests in rows]
    return {module: tests for modules, tests in listed for module in modules}


def test_every_module_has_tests_of_its_name_or_stands_in_the_table() -> None:
    assert modules_without_own_file() == set(table())


def test_the_tests_that_the_table_names_are_there() -> None:
    missing = {test for tests in table().values() for test in tests if not (REPOSITORY / "tests" / test).is_file()}
    assert not missing and all(table().values())
