from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from small_models import hashes


def test_an_output_is_completed_by_its_folder_alone(
    demo_model: str,
    tmp_path: Path,
    run_json: Callable[..., Any],
    run_text: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, more = str(tmp_path / "out"), ["--recipe", "mxfp4", "--max-shard-size", "200KB"]
    run_json("quantize", demo_model, str(tmp_path / "whole"), *more)
    with monkeypatch.context() as killed:  # every worker ends before it can complete the output
        killed.setattr(import_module("halfbyte.convert.workers"), "finish_if_last", lambda *_: False)
        for i in (0, 1):
            run_json("quantize", demo_model, out, *more, "--shard", f"{i}/2")
    assert not (tmp_path / "out" / "config.json").exists()
    assert "is complete" in run_text("finish", out)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert "already complete" in run_text("finish", out)


def test_missing_files_are_named(
    demo_model: str, tmp_path: Path, run_json: Callable[..., Any], refusal: Callable[..., str]
) -> None:
    out, more = str(tmp_path / "out"), ["--recipe", "mxfp4", "--max-shard-size", "200KB"]
    run_json("quantize", demo_model, out, *more, "--shard", "1/2")
    assert "are not finished: model-00001-of-" in refusal("finish", out)
    assert "already_complete" not in run_json("quantize", demo_model, out, *more, "--shard", "0/2")


def test_a_folder_without_workers_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    assert "no output that workers have begun" in refusal("finish", str(tmp_path))
