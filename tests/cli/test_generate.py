"""``generate`` and ``chat`` on a small trained model."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.cli import main

pytest.importorskip("torch")
pytest.importorskip("transformers")
Run = Callable[..., Any]


@pytest.fixture
def model(shared: Path) -> str:
    return str(shared / "data" / "models" / "qwen3-tiny-wiki")


def test_generate_writes_the_text_and_its_speed(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "--prompt", "The city of", "--max-tokens", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "5 tokens, " in captured.err and " tokens/s; " in captured.err


def test_generate_as_json_and_from_stdin(model: str, run_json: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_json("generate", model, "--prompt", "The city of", "--max-tokens", "5")
    assert found["tokens"] == 5 and found["finish"] == "length" and found["text"]
    monkeypatch.setattr("sys.stdin", io.StringIO("The city of"))
    assert run_json("generate", model, "--prompt", "-", "--max-tokens", "5")["text"] == found["text"]


def test_chat_answers_line_by_line(model: str, run_json: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Where is London?\nAnd Paris?\n\nnever read\n"))
    found = run_json("chat", model, "--max-tokens", "4", "--temperature", "0")["answers"]
    assert [answer["question"] for answer in found] == ["Where is London?", "And Paris?"]
    assert found[1]["prompt_tokens"] > found[0]["prompt_tokens"]


def test_chat_prints_answers_on_a_terminal(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Where is London?\n"))
    assert main(["chat", model, "--max-tokens", "4", "--seed", "1", "--system", "Be short."]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() and " tokens/s" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--top-p", "2"), "sampling needs"), (("--threads", "0"), "--threads must be 1 or more")],
)
def test_options_that_do_not_fit_are_one_sentence(
    options: tuple[str, ...], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", model, "--prompt", "a", *options]) == 2
    assert message in capsys.readouterr().err


def test_drafts_leave_the_text_and_show_their_gain(run_json: Run, capsys: pytest.CaptureFixture[str]) -> None:
    demo = str(Path(halfbyte.__file__).parent / "demo_model")
    options = ("generate", demo, "--prompt", "The city of", "--dtype", "float32", "--max-tokens", "20")
    found = run_json(*options, "--speculative", "2")
    assert found["text"] == run_json(*options)["text"]
    counts = found["speculation"]
    assert 0 < counts["accepted"] <= counts["drafted"] <= 2 * counts["passes"] and counts["speedup"] > 0
    assert main([*options, "--speculative"]) == 0
    line = capsys.readouterr().err
    assert " drafts accepted, " in line and " times as fast as without drafts" in line


def test_drafts_need_a_head(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "--prompt", "a", "--speculative"]) == 2
    assert "has no multi-token-prediction head" in capsys.readouterr().err
