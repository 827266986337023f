from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli.shard_options import NUMBERS, parse_shard
from small_models import hashes


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NUMBERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_scheduler_says_which_worker_this_is(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "3")
    assert parse_shard("auto/16") == (3, 16) and parse_shard("2/16") == (2, 16)


@pytest.mark.parametrize("text", ["3", "3/3", "-1/3", "a/3", "1/0", "1/2/3", "auto/4", ""])
def test_other_shards_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_shard(text)


@pytest.mark.parametrize("recipe", ["nvfp4", "mixfp4"])
def test_three_workers_write_what_one_command_does(
    demo_model: str, tmp_path: Path, run_json: Callable[..., Any], recipe: str
) -> None:
    more = ["--recipe", recipe, "--dialect", "halfbyte", "--max-shard-size", "200KB"]
    run_json("quantize", demo_model, str(tmp_path / "whole"), *more)
    states = [
        run_json("quantize", demo_model, str(tmp_path / "out"), *more, "--shard", f"{i}/3")["complete"]
        for i in (1, 2, 0)
    ]
    assert states == [False, False, True]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_options_that_need_the_whole_output_are_refused(
    demo_model: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    command = ["quantize", demo_model, str(tmp_path / "out"), "--recipe", "nvfp4", "--shard", "0/2"]
    assert "--verify needs the whole output" in refusal(*command, "--verify")
    assert "--keep-going needs the whole output" in refusal(*command, "--keep-going")
    assert "every worker would calibrate again" in refusal(*command, "--calibration", "text.txt")
    assert not (tmp_path / "out").exists()
