"""The rooms of the package: who may import whom, and the picture of it in docs/architecture.md."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TORCH = {"torch", "transformers", "accelerate", "lm_eval", "vllm"}
# rooms that need torch anyway; others import these, and only these, inside functions
NEEDS_TORCH = {"calibrate", "engines", "evaluate", "gpu", "runtime", "train", "transformers"}


def _drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_architecture", REPOSITORY / "scripts" / "draw_architecture.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


drawing = _drawing()
FLOOR = {name: number for number, floor in enumerate(drawing.FLOORS) for name in floor}
IMPORTS = drawing.imports()
PAIRS = sorted({(drawing.room(i.module), drawing.room(i.imported)) for i in IMPORTS})


def test_every_room_has_one_floor_of_at_most_14() -> None:
    rooms = {drawing.room(module) for module in drawing.modules()}
    assert rooms - drawing.DOORS == set(FLOOR)
    assert len(FLOOR) == sum(len(floor) for floor in drawing.FLOORS) and len(drawing.FLOORS) <= 14


@pytest.mark.parametrize(("importer", "imported"), [(a, b) for a, b in PAIRS if a != b and not {a, b} & drawing.DOORS])
def test_a_room_imports_only_from_floors_below(importer: str, imported: str) -> None:
    assert FLOOR[imported] < FLOOR[importer], f"{importer} must not import {imported}, also not inside a function"


def test_imports_inside_functions_are_for_the_command_line_and_for_what_needs_torch() -> None:
    lazy = {(i.module, i.imported) for i in IMPORTS if i.lazy and drawing.room(i.module) != drawing.room(i.imported)}
    wrong = [
        (a, b)
        for a, b in lazy
        if drawing.room(a) != "cli" and drawing.room(b) not in NEEDS_TORCH and drawing.room(a) not in NEEDS_TORCH
    ]
    assert not wrong


def test_no_file_imports_itself_over_others() -> None:
    below: dict[str, set[str]] = {}
    for found in IMPORTS:
        if not found.lazy:
            below.setdefault(found.module, set()).add(found.imported)
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(below.get(module, ())):
                walk(other, (*path, module))
            done.add(module)

    for module in sorted(below):
        walk(module, ())


def test_every_file_has_a_name_of_its_own() -> None:
    names = Counter(path.name for path in drawing.modules().values())
    assert {name for name, count in names.items() if count > 1} <= {"__init__.py"}


def test_rooms_without_torch_do_not_import_it() -> None:
    for module, path in drawing.modules().items():
        if drawing.room(module) in NEEDS_TORCH:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & TORCH, module


def test_the_picture_is_that_of_the_code() -> None:
    drawn = drawing.PICTURE.read_text(encoding="utf-8")
    assert drawn == drawing.picture(), "run: python scripts/draw_architecture.py"
    assert "images/architecture.svg" in (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_picture_names_every_room() -> None:
    names = re.findall(r'class="name">([^<]+)<', drawing.picture())
    assert sorted(names) == sorted(FLOOR)
