"""What nobody has thought of ends in one sentence."""

from __future__ import annotations

import argparse

import pytest

from halfbyte import cli
from halfbyte.cli import main


@pytest.mark.parametrize("error", [KeyError("a"), RecursionError("deep"), MemoryError(), ZeroDivisionError("x\ny")])
def test_an_unexpected_error_is_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(cli.COMMANDS["formats"], "run", run)
    monkeypatch.delenv("HALFBYTE_DEBUG", raising=False)
    assert main(["formats"]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "Traceback" not in text
    assert text.startswith(f"halfbyte: this is a bug, or a damaged file: {type(error).__name__} at test_unexpected.py:")
    monkeypatch.setenv("HALFBYTE_DEBUG", "1")
    assert main(["formats"]) == 2
    assert "Traceback" in capsys.readouterr().err
