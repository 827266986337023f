"""``halfbyte train`` on the bundled model: the whole way, killed and continued, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from halfbyte.demo import MODEL, TEXT
from halfbyte.errors import HalfbyteError, OutputError
from halfbyte.train import run_training
from halfbyte.train.run_training import StudentOptions, TextOptions, train_end_to_end, work_folder
from halfbyte.train.training_loop import TrainingOptions
from halfbyte.verify.weights import verify
from small_models import hashes, recipe, run

SHORT = TextOptions((str(TEXT),), length=32, batch_size=2)
STUDENT = StudentOptions(answers=0)


def command(start: Path, out: Path, *more: str) -> list[str]:
    options = ["--start", start, "--text", TEXT, "--length", "32", "--batch", "2", "--steps", "8", "--answers", "0"]
    return [sys.executable, "-m", "halfbyte", "train", *map(str, (MODEL, out, *options, *more))]


def test_a_killed_training_continues_to_the_same_bytes(demo_start: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(demo_start, whole), check=True, capture_output=True)
    process = subprocess.Popen(command(demo_start, killed), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    state = work_folder(killed) / "state.pt"
    until = time.monotonic() + 300
    while not state.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and state.exists() and not killed.exists()
    refused = subprocess.run(command(demo_start, killed), capture_output=True, text=True)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    subprocess.run(command(demo_start, killed, "--resume"), check=True, capture_output=True)
    assert hashes(whole) == hashes(killed) and not work_folder(killed).exists()
    assert verify(killed, demo_start).ok


def test_a_training_says_what_it_did(demo_start: Path, tmp_path: Path) -> None:
    student = StudentOptions(answers=1, top_k=64)
    done = train_end_to_end(
        str(MODEL), tmp_path / "out", str(demo_start), "distill", SHORT, TrainingOptions(4), student
    )
    record = json.loads((tmp_path / "out" / "halfbyte.json").read_text())["training"]
    assert record["method"] == "distill" and record["steps"] == 4 and record["tokens"] == 256
    assert record["teacher"] == MODEL.name and record["top_k"] == 64 and record["best_step"] == done.outcome.best
    assert set(done.answers) == {"start", "trained"} and done.answers["start"]["limit"] == 64
    assert str(tmp_path) not in json.dumps(record)


def test_codes_of_int4_experts_are_carried_and_not_encoded_again(tmp_path: Path) -> None:
    run(MODEL, tmp_path / "int4", recipe({"match": "experts", "format": "int4_g32"}), "compressed-tensors")
    done = train_end_to_end(
        str(MODEL), tmp_path / "out", str(tmp_path / "int4"), "task", SHORT, TrainingOptions(4, rate=1e-3), STUDENT
    )
    config: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized" and done.outcome.best > 0
    assert json.loads((tmp_path / "out" / "halfbyte.json").read_text())["training"]["teacher"] is None
    assert verify(tmp_path / "out", tmp_path / "int4").ok


def refused(match: str, start: object, out: Path, text: TextOptions = SHORT, **more: Any) -> None:
    student = StudentOptions(**{"answers": 0, **more})
    with pytest.raises(HalfbyteError, match=match) as error:
        train_end_to_end(str(MODEL), out, str(start), "distill", text, TrainingOptions(2), student)
    assert "\n" not in str(error.value)
    assert not out.exists() and not work_folder(out).exists()


def test_wrong_input_is_refused_in_one_sentence_and_nothing_is_written(
    demo_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (tmp_path / "blank.txt").write_text("\n\n")
    refused("is empty", demo_start, out, TextOptions((str(tmp_path / "blank.txt"),)))
    refused("fewer than one sequence", demo_start, out, TextOptions((str(TEXT),), length=10**6))
    refused("holds no quantized weights", MODEL, out)
    refused("holds another training|cannot compute", demo_start, out, dtype="int8")
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    refused("needs about", demo_start, out)


def test_a_folder_in_use_is_refused_before_anything_is_trained(demo_start: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        train_end_to_end(str(MODEL), tmp_path, str(demo_start), "distill", SHORT, TrainingOptions(2), STUDENT)


def test_a_rate_that_breaks_the_model_at_once_is_refused(
    demo_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(run_training.Distillation):
        def __call__(self, model: Any, ids: Any) -> Any:
            loss, count = super().__call__(model, ids)
            return (loss * float("nan") if loss.requires_grad else loss), count

    monkeypatch.setattr(run_training, "Distillation", Broken)
    refused("the loss of step 1 is nan", demo_start, tmp_path / "out")
