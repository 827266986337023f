from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.checkpoint import lock
from halfbyte.checkpoint.lock import OutputLock
from halfbyte.errors import OutputError

HOLDER = """
import sys, time
from halfbyte.checkpoint.lock import OutputLock
with OutputLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_the_second_process_says_which_one_is_writing(tmp_path: Path) -> None:
    child = holder(tmp_path)
    try:
        with (
            pytest.raises(OutputError, match=rf"process {child.pid} on .* is writing .* right now"),
            OutputLock(tmp_path),
        ):
            pass
    finally:
        child.kill()
        child.communicate()


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    child = holder(tmp_path)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert (tmp_path / ".halfbyte" / "lock").exists()
    with OutputLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_one_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with OutputLock(tmp_path), pytest.raises(OutputError, match="is writing"), OutputLock(tmp_path):
        pass


def test_where_locks_are_unknown_a_living_process_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "lock", lambda _: False)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (tmp_path / ".halfbyte").mkdir()
    (tmp_path / ".halfbyte" / "lock").write_text(f"{child.pid} {platform.node()}\n")
    with pytest.raises(OutputError, match=f"process {child.pid} "), OutputLock(tmp_path):
        pass
    child.kill()
    child.wait()
    with OutputLock(tmp_path):
        pass


def test_the_lock_waits_for_no_file_that_was_removed(tmp_path: Path) -> None:
    child = holder(tmp_path)
    (tmp_path / ".halfbyte" / "lock").unlink()  # as at the very end of a conversion
    begun = time.monotonic()
    with OutputLock(tmp_path):
        assert time.monotonic() - begun < 5
    child.kill()
    child.communicate()


@pytest.mark.parametrize(
    "content", ["", "999999999 here", "9" * 299, "\u00b2 host", "1 another-host", "\0\0\0", "a b c d"]
)
def test_a_lock_that_no_process_holds_is_taken_whatever_it_says(tmp_path: Path, content: str) -> None:
    (tmp_path / ".halfbyte").mkdir()
    (tmp_path / ".halfbyte" / "lock").write_text(content)
    with OutputLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out" / ".halfbyte").mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out" / ".halfbyte" / "lock").symlink_to("../../precious")
    with pytest.raises(OutputError, match="lock cannot be written"), OutputLock(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_in_place_of_the_lock_does_not_hang(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / ".halfbyte").mkdir()
    make(tmp_path / ".halfbyte" / "lock")
    with contextlib.suppress(OutputError), OutputLock(tmp_path):
        pass
