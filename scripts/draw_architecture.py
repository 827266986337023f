"""Draw docs/images/architecture.svg from the imports of the package: rooms on their floors, and who imports whom.

    python scripts/draw_architecture.py

``FLOORS`` is the rule that tests/test_architecture.py holds: a room imports only from floors below its own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "src" / "halfbyte"
PICTURE = REPOSITORY / "docs" / "images" / "architecture.svg"

FLOORS: tuple[dict[str, str], ...] = (
    {"errors": "one sentence each", "renamed": "old arguments"},
    {"formats": "what a number is", "checkpoint": "files and headers", "plugins": "what others add"},
    {"kernels": "compiled code", "models": "roles and families", "stores": "hub and buckets"},
    {"search": "numbers to codes", "dialects": "engines' layouts", "compatibility": "facts about engines"},
    {"recipes": "rules", "source": "a checkpoint as weights", "gpu": "Triton kernels"},
    {"calibration": "files of statistics", "runtime": "torch modules"},
    {"plan": "fate and place of all tensors"},
    {"convert": "plan to files", "engines": "plugins of engines"},
    {
        "verify": "files against source",
        "audit": "what is wrong with a file",
        "patch": "differences of checkpoints",
        "evaluate": "measurements",
        "transformers": "a name to import",
    },
    {
        "calibrate": "text through a model",
        "api": "Python functions",
        "demo": "the bundled model",
        "allocate": "a format for each",
        "report": "pages and cards",
        "serve": "a door before servers",
    },
    {"train": "weights that learn"},
    {"cli": "one file per command"},
)
"""Rooms from the ground up, with a few words for each."""

# these name things of other rooms and are no rooms: the package itself, and doors
DOORS = {"__init__", "__main__", "view"}
WIDTH, HEIGHT, GAP, FLOOR = 1120, 46, 16, 92


class Import(NamedTuple):
    """A module that another one imports; ``lazy``: inside a function."""

    module: str
    imported: str
    lazy: bool


def room(module: str) -> str:
    """The room of a module: the first part of its name behind ``halfbyte``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports() -> list[Import]:
    """Every import of one module of the package by another; those for type checkers do not count."""
    known = modules()
    return [found for module, path in known.items() for found in _imports_of(module, path, known)]


def _imports_of(module: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom) and child.module:
                full = [f"{child.module}.{alias.name}" for alias in child.names]
                names = [name if name in known else child.module for name in full]
            yield from (Import(module, name, inside) for name in names if name in known and name != module)
            yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def arrows() -> set[tuple[str, str]]:
    """Pairs of rooms of which the first imports the second, lazily or not; what a path of others says is left out."""
    pairs = {(room(i.module), room(i.imported)) for i in imports()}
    direct = {(a, b) for a, b in pairs if a != b and not {a, b} & DOORS}
    below: dict[str, set[str]] = {}
    for a, b in direct:
        below.setdefault(a, set()).add(b)

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        stack = [start]
        while stack:
            for name in below.get(stack.pop(), set()) - seen:
                seen.add(name)
                stack.append(name)
        return seen

    return {(a, b) for a, b in direct if not any(b in reachable(c) for c in below[a] - {b})}


def picture() -> str:
    """The SVG, readable on light and on dark pages."""
    boxes = _boxes()
    height = FLOOR * len(FLOORS) + GAP
    shapes = []
    drawn = sorted(arrows())
    for a, b in drawn:
        starts = sorted((pair for pair in drawn if pair[0] == a), key=lambda pair: boxes[pair[1]][0])
        ends = sorted((pair for pair in drawn if pair[1] == b), key=lambda pair: boxes[pair[0]][0])
        x1, y1 = _anchor(boxes[a], starts.index((a, b)), len(starts)), boxes[a][1] + HEIGHT
        x2, y2 = _anchor(boxes[b], ends.index((a, b)), len(ends)), boxes[b][1] - 4
        bend = max(24.0, (y2 - y1) / 2)
        curve = f"M{x1:.0f} {y1} C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2}"
        shapes.append(f'<path d="{curve}" marker-end="url(#head)"/>')
    for number, floor in enumerate(FLOORS):
        for name, words in floor.items():
            x, y, width = boxes[name]
            middle = x + width / 2
            shapes.append(f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{HEIGHT}" rx="6"/>')
            shapes.append(f'<text x="{middle:.0f}" y="{y + 20}" class="name">{escape(name)}</text>')
            shapes.append(f'<text x="{middle:.0f}" y="{y + 36}">{escape(words)}</text>')
        shapes.append(f'<text x="14" y="{_top(number) + 28}" class="floor">{number + 1}</text>')
    return _HEAD.format(width=WIDTH, height=height) + "\n".join(shapes) + "\n</svg>\n"


def _boxes() -> dict[str, tuple[float, int, float]]:
    """Left edge, top edge and width of every room."""
    boxes = {}
    for number, floor in enumerate(FLOORS):
        width = min(200.0, (WIDTH - 60 - GAP * 3 * (len(floor) - 1)) / len(floor))
        # single rooms would hide the arrows that pass them
        left = 30 + (WIDTH - 30 - len(floor) * width - GAP * 3 * (len(floor) - 1)) / 2
        for i, name in enumerate(floor):
            boxes[name] = (left + i * (width + GAP * 3), _top(number), width)
    return boxes


def _top(number: int) -> int:
    return GAP + FLOOR * (len(FLOORS) - 1 - number)


def _anchor(box: tuple[float, int, float], index: int, count: int) -> float:
    return box[0] + box[2] * (index + 1) / (count + 1)


_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" \
role="img" aria-label="The rooms of halfbyte on their floors; arrows lead from a room to those that it imports.">
<style>
text {{ font: 12px system-ui, sans-serif; text-anchor: middle; fill: #57606a; }}
.name {{ font-size: 14px; font-weight: 600; fill: #1f2328; }}
.floor {{ font-size: 12px; }}
rect {{ fill: #f6f8fa; stroke: #8c959f; }}
path {{ fill: none; stroke: #0969da; stroke-opacity: 0.55; stroke-width: 1.3; }}
marker path {{ fill: #0969da; stroke: none; fill-opacity: 0.8; }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #9198a1; }}
.name {{ fill: #f0f6fc; }}
rect {{ fill: #151b23; stroke: #656c76; }}
path {{ stroke: #4493f8; }}
marker path {{ fill: #4493f8; }}
}}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">\
<path d="M0 0 L8 4 L0 8 z"/></marker></defs>
"""


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"{PICTURE.relative_to(REPOSITORY)}: {sum(map(len, FLOORS))} rooms, {len(FLOORS)} floors")
