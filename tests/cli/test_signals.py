"""Real processes that are told to end, or that meet on one output: what they say, and what a rerun makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from small_models import MOE_CONFIG, hashes, moe_tensors, write_checkpoint

PROGRAM = """
import sys, time
from importlib import import_module
from halfbyte.cli import main
work_unit = import_module("halfbyte.convert.work_unit")
encode_slice, done = work_unit.encode_slice, 0
def slow(*arguments):
    global done
    done += 1
    if done > 6:
        time.sleep(0.3)
    return encode_slice(*arguments)
work_unit.encode_slice = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG)


def arguments(moe: Path, out: Path) -> list[str]:
    return ["quantize", str(moe), str(out), "--recipe", "mxfp4", "--max-shard-size", "40KB", "--threads", "1"]


def heed() -> None:
    """Let a child heed signals that the tests' own parent may ignore, as nohup and shells in the background do."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(moe: Path, out: Path, before: Callable[[], object] = heed) -> subprocess.Popen[str]:
    """A conversion that is slow after its first weights, once its first file is finished."""
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments(moe, out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )
    journal = out / ".halfbyte" / "journal.jsonl"
    while child.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
        time.sleep(0.01)
    return child


def whole(moe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "halfbyte", *arguments(moe, out)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def uninterrupted(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert whole(moe, out).returncode == 0
    return hashes(out)


@pytest.mark.parametrize(
    "name", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow)]
)
def test_a_signal_ends_a_conversion_with_a_sentence_and_a_rerun_continues(
    moe: Path, tmp_path: Path, uninterrupted: dict[str, str], name: str
) -> None:
    out = tmp_path / "out"
    child = start(moe, out)
    child.send_signal(getattr(signal, name))
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in errors, errors
    assert f"interrupted; finished files stay in {out}: run the same command again" in errors
    assert not (out / "config.json").exists() and not list(out.glob("*.partial"))
    again = whole(moe, out)
    assert again.returncode == 0 and "continuing in" in again.stderr
    assert hashes(out) == uninterrupted
    finished = whole(moe, out)
    assert finished.returncode == 0 and "already complete" in finished.stdout


@pytest.mark.slow
def test_nohup_still_protects_from_the_terminal_that_closes(moe: Path, tmp_path: Path) -> None:
    child = start(moe, tmp_path / "out", lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    child.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert child.poll() is None
    child.kill()
    child.communicate()


@pytest.mark.slow
def test_the_second_conversion_on_one_output_names_the_first(
    moe: Path, tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    child = start(moe, tmp_path / "out")
    second = whole(moe, tmp_path / "out")
    assert second.returncode == 2 and f"process {child.pid} on " in second.stderr
    child.communicate(timeout=120)
    assert child.returncode == 0 and hashes(tmp_path / "out") == uninterrupted


@pytest.mark.slow
def test_what_a_killed_run_left_is_removed_by_the_next(
    moe: Path, tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    child = start(moe, tmp_path / "out")
    child.kill()
    child.communicate()
    assert list((tmp_path / "out").glob("*.partial")) and (tmp_path / "out" / ".halfbyte" / "lock").exists()
    assert whole(moe, tmp_path / "out").returncode == 0
    assert hashes(tmp_path / "out") == uninterrupted
