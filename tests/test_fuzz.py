"""The fuzz driver: every target holds for some cases, and each kind of finding is one."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzz import __main__ as driver
from fuzz.mutate import mutate, mutate_json
from fuzz.targets import Target

from halfbyte.errors import CheckpointError


@pytest.mark.skipif(not find_spec("gguf"), reason="the corpus has a file that gguf writes")
def test_every_target_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert driver.main(["--seconds", "60", "--cases", "25", "--seed", "1", "--output", str(report)]) == 0
    found = json.loads(report.read_text())
    assert {target["cases"] for target in found["targets"]} == {25} and found["findings"] == 0
    assert len(found["targets"]) == 16 and "400 cases, seed 1, 0 findings" in capsys.readouterr().out


def run(check: Callable[[bytes], None], folder: Path, cases: int = 3) -> dict:
    target = Target("planted", lambda rng: rng.randbytes(4), check)
    return driver._isolated(target, 0, 30, cases, folder)


def refuse(case: bytes) -> None:
    raise CheckpointError("no")


def test_a_refusal_is_no_finding(tmp_path: Path) -> None:
    assert run(refuse, tmp_path) | {"slowest": 0, "growth": 0} == {
        "target": "planted",
        "cases": 3,
        "refused": 3,
        "slowest": 0,
        "growth": 0,
        "findings": [],
    }


def test_any_other_exception_is_one_with_its_place_and_bytes(tmp_path: Path) -> None:
    first = run(lambda case: [][0], tmp_path)["findings"][0]
    assert first["case"] == 0 and first["what"].startswith("IndexError at test_fuzz.py:") and len(first["bytes"]) == 8


def test_a_hang_is_one_and_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "CPU_SECONDS", 0.2)

    def hang(case: bytes) -> None:
        began = time.process_time()
        while time.process_time() - began < 20:
            pass

    assert "HangError" in run(hang, tmp_path, 1)["findings"][0]["what"]


def test_growth_of_memory_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "GROWTH_BYTES", 100 << 20)
    kept: list[bytes] = []
    found = run(lambda case: kept.append(os.urandom(200 << 20)), tmp_path, 1)["findings"]
    assert found and "memory grew by" in found[0]["what"]


def test_the_death_of_the_process_is_one(tmp_path: Path) -> None:
    found = run(lambda case: os.kill(os.getpid(), signal.SIGKILL), tmp_path)
    assert found["findings"] == [{"case": 0, "what": "the process ended with 9 (Killed)"}]


@pytest.mark.parametrize("change", [mutate, mutate_json])
def test_a_case_depends_on_its_seed_alone(change: Callable[[bytes, random.Random], bytes]) -> None:
    data = b'{"a": [1, 2, {"b": null}], "c": "text"}'
    cases = [[change(data, random.Random(f"{seed}/{i}")) for i in range(50)] for seed in (1, 1, 2)]
    assert cases[0] == cases[1] != cases[2] and len(set(cases[0])) > 20
