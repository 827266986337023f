"""Tables, units, JSON and progress bars."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from halfbyte.cli import human, output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_tables_are_aligned_columns(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("name", ">count"), [("a", 1), ("long name", 100)], ("all", 101))
    assert capsys.readouterr().out.splitlines() == [
        "name       count",
        "---------  -----",
        "a              1",
        "long name    100",
        "---------  -----",
        "all          101",
    ]


def test_tables_on_a_terminal_keep_brackets_and_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    output.table(("name", ">count"), [("[bold]a[/bold]", 1)], ("all", 1))
    assert "[bold]a[/bold]" in terminal.getvalue()
    assert "all" in terminal.getvalue()


def test_json_takes_dataclasses_paths_arrays_and_infinities(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Row:
        path: Path
        value: float

    output.print_json({"row": Row(Path("a"), float("inf")), "scalar": np.float32(1.5), 3: (1, 2)})
    assert json.loads(capsys.readouterr().out) == {
        "row": {"path": "a", "value": None},
        "scalar": 1.5,
        "3": [1, 2],
    }


def test_progress_is_silent_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("working", 10, silent=False) as report:
        assert report is None
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_shows_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with output.progress("working", 4_000_000, silent=False) as report:
        assert report is not None
        report(1_000_000)
    assert "working" in screen.getvalue()
    assert "1.0/4.0 MB" in screen.getvalue()


def test_progress_is_silent_with_json_even_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    with output.progress("working", 10, silent=True) as report:
        assert report is None


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("4GiB", 4 << 30), ("1.5k", 1500), ("123", 123), ("2kib", 2048)],
)
def test_sizes_are_parsed(text: str, count: int) -> None:
    assert human.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 XB", "0", "1e9", "nan"])
def test_other_words_are_no_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        human.parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (999_999, "1 MB"), (21_900_000_000, "21.9 GB")],
)
def test_sizes_are_shown_with_three_digits(count: int, text: str) -> None:
    assert human.size(count) == text


def test_exact_sizes_say_both() -> None:
    assert human.exact(4_131_072) == "4,131,072 bytes (4.13 MB)"
    assert human.exact(12) == "12 bytes"


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "bell\x07", "\u202e"])
def test_control_characters_are_spelled_out(text: str) -> None:
    assert human.clean(text).isprintable()
    assert os.linesep not in human.clean(text)


def test_without_a_terminal_steps_are_lines_on_stderr_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.cli import output

    monkeypatch.setattr(output, "SECONDS", 0.0)
    with output.steps("calibrating", False) as report:
        assert report is not None
        for done in range(4):
            report(done, 3)
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[0] == "halfbyte: calibrating: 0 of 3" and lines[1] == "halfbyte: calibrating: 1 of 3, 0 s left"
    assert lines[-1] == "halfbyte: calibrating: 3 of 3"
