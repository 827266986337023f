from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def damaged(quantized: str, tmp_path: Path) -> str:
    """A quantized checkpoint with some bytes of a kept tensor overwritten, and a side file lost."""
    out = tmp_path / "damaged"
    shutil.copytree(quantized, out)
    with (out / "model.safetensors").open("r+b") as file:
        header = int.from_bytes(file.read(8), "little")
        file.seek(8 + header + 100)
        file.write(b"\x11\x3f" * 8)
    (out / "tokenizer.json").unlink()
    return str(out)


def test_json_of_a_right_output(run_json: Callable[..., Any], quantized: str, demo_model: str) -> None:
    found = run_json("verify", quantized, "--against", demo_model)
    assert found["ok"] is True and found["problems"] == []
    assert (found["quantized"], found["kept"]) == (33, 58)
    assert len(found["weights"]) == 33
    assert {row["role"] for row in found["accuracy"]} >= {"experts.down", "attention.q"}


def test_problems_are_listed_and_give_exit_code_1(
    run_json: Callable[..., Any], run_text: Callable[..., str], damaged: str, demo_model: str
) -> None:
    found = run_json("verify", damaged, "--against", demo_model, code=1)
    assert found["ok"] is False
    assert any("bytes differ from the source" in problem for problem in found["problems"])
    assert any("tokenizer.json" in problem for problem in found["problems"])
    text = run_text("verify", damaged, "--against", demo_model, code=1)
    assert f"{len(found['problems'])} problem(s) found" in text


def test_bound_on_the_error_can_be_set(run_json: Callable[..., Any], quantized: str, demo_model: str) -> None:
    found = run_json("verify", quantized, "--against", demo_model, "--max-relmse", "0.001", code=1)
    assert len(found["problems"]) >= 33
    assert "at most 0.001 is allowed" in found["problems"][0]


def test_an_unfinished_output_is_told_apart(refusal: Callable[..., str], demo_model: str, tmp_path: Path) -> None:
    (tmp_path / ".halfbyte").mkdir()
    (tmp_path / ".halfbyte" / "journal.jsonl").write_text("")
    assert "unfinished conversion" in refusal("verify", str(tmp_path), "--against", demo_model, code=1)


def test_an_output_is_checked_without_its_source(run_json: Callable[..., Any], quantized: str) -> None:
    document = run_json("verify", quantized)
    assert document["ok"] and document["source"] is None and document["checksums"]["files"] >= 3


def test_source_must_be_named_where_there_are_no_checksums(refusal: Callable[..., str], demo_model: str) -> None:
    assert "--against SRC" in refusal("verify", demo_model, code=1)


def test_a_conversion_says_that_codes_stayed_and_global_scales_were_rounded(
    run_text: Callable[..., str], demo_model: str, tmp_path: Path
) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    run_text("quantize", demo_model, first, "--recipe", "mixfp4", "--dialect", "halfbyte")
    text = run_text("convert", first, second, "--dialect", "compressed-tensors", "--verify")
    exact = int(text.split(" have exactly its values")[0].rsplit(" ", 1)[1])
    assert f"{33 - exact} its codes and block scales with a rounded global scale" in text
