"""What commands print: tables (boxes on a terminal, plain columns in a pipe), JSON, progress bars."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from halfbyte.cli.human import clean, duration
from halfbyte.cli.json_stdout import write_document

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

Cell = str | int | float | None


def print_json(document: Any) -> None:
    """One JSON document on stdout; numbers that are not finite become null."""
    write_document(json.dumps(plain(document), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses as objects, what is not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value


def say(*lines: str) -> None:
    """Lines of text on stdout."""
    for line in lines:
        print(clean(line))


def warn(message: str) -> None:
    """Print a note on stderr."""
    print(f"halfbyte: {clean(message)}", file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], last: Sequence[Cell] | None = None) -> None:
    """A table on stdout; ``last`` is a line of totals.

    A column whose title begins with ">" is set to the right; one with "~" may be wrapped on a narrow terminal.
    """
    titles = [title.lstrip(">~") for title in columns]
    texts = [[clean("" if cell is None else str(cell)) for cell in row] for row in rows]
    total = None if last is None else [clean("" if cell is None else str(cell)) for cell in last]
    everything = [titles, *texts, *([total] if total else [])]
    widths = [max(len(row[i]) for row in everything) for i in range(len(titles))]
    if sys.stdout.isatty():
        _boxed(columns, titles, widths, texts, total)
        return
    rule = ["-" * width for width in widths]
    for row in [titles, rule, *texts, *([rule, total] if total else [])]:
        cells = [c.rjust(w) if t[0:1] == ">" else c.ljust(w) for c, w, t in zip(row, widths, columns, strict=True)]
        print("  ".join(cells).rstrip())


def _boxed(
    columns: Sequence[str], titles: list[str], widths: list[int], rows: list[list[str]], total: list[str] | None
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, show_footer=total is not None, pad_edge=False, collapse_padding=True)
    for i, title in enumerate(titles):
        side: Literal["left", "right"] = "right" if columns[i].startswith(">") else "left"
        footer = total[i] if total else ""
        drawn.add_column(title, footer=footer, justify=side, no_wrap=not columns[i].startswith("~"))
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    # on a terminal narrower than this, lines run over: rather that than numbers cut off
    least = sum(min(w, 20) if c.startswith("~") else w for c, w in zip(columns, widths, strict=True))
    console = Console()
    console.width = max(console.width, least + 2 * len(widths) + 2)
    console.print(drawn)


@contextmanager
def progress(label: str, total: int, silent: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar of bytes with speed and time left on stderr; None if silent or if not both streams are a terminal."""
    if silent or not _on_terminal():
        yield None
        return
    from rich import progress as rich

    columns = (rich.DownloadColumn(), rich.TransferSpeedColumn(), rich.TimeRemainingColumn(compact=True))
    with _bar(*columns) as bar:
        task = bar.add_task(clean(label), total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def steps(label: str, silent: bool) -> Iterator[Callable[[int, int], None] | None]:
    """The same for work that is counted in steps: the callback takes how many are done, and of how many.

    Without a terminal it is a line on stderr for each step, at most one in ``SECONDS``, with the time that is left.
    """
    if silent:
        yield None
        return
    if not _on_terminal():
        yield _lines(label)
        return
    from rich import progress as rich

    with _bar(rich.MofNCompleteColumn(), rich.TimeRemainingColumn(compact=True)) as bar:
        task = bar.add_task(clean(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


SECONDS = 1.0
"""Between two lines of progress where there is no terminal."""


def _lines(label: str) -> Callable[[int, int], None]:
    """Print ``halfbyte: calibrating: 3 of 40, 2 min left`` on stderr, judged by the steps so far."""
    state = {"began": time.monotonic(), "first": -1.0, "said": 0.0}

    def report(done: int, total: int) -> None:
        now = time.monotonic()
        if state["first"] < 0:
            state["first"] = done
        if done < total and now - state["said"] < SECONDS and state["said"]:
            return
        state["said"] = now
        steps_done = done - state["first"]
        left = (total - done) * (now - state["began"]) / steps_done if steps_done > 0 else None
        rest = "" if left is None or done == total else f", {duration(left)} left"
        print(f"halfbyte: {clean(label)}: {done} of {total}{rest}", file=sys.stderr, flush=True)

    return report


@contextmanager
def status(label: str, silent: bool) -> Iterator[None]:
    """What is being done, shown on a terminal while it lasts."""
    if silent or not _on_terminal():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(clean(label)):
        yield


def _on_terminal() -> bool:
    return sys.stdout.isatty() and sys.stderr.isatty()


def _bar(*columns: ProgressColumn) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    first = (TextColumn("{task.description}"), BarColumn())
    return Progress(*first, *columns, console=Console(stderr=True), transient=True)
