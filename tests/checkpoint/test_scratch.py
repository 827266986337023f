"""Folders for the time of one run, and what remains of those of killed runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.checkpoint.lock import lock
from halfbyte.checkpoint.scratch import scratch_folder

PROGRAM = """
import sys, time
from halfbyte.checkpoint.scratch import scratch_folder
with scratch_folder("work", sys.argv[1]) as folder:
    (folder / "part").write_bytes(bytes(1000))
    print("there", flush=True)
    time.sleep(60)
"""


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def writing(place: Path) -> subprocess.Popen[str]:
    """A process that has a scratch folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(place)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "there\n"
    return child


def gone() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_it_is_removed_at_the_end_also_after_an_error(tmp_path: Path) -> None:
    with scratch_folder("work", tmp_path) as folder:
        (folder / "part").write_bytes(b"x")
    with pytest.raises(KeyError), scratch_folder("work", tmp_path):
        raise KeyError
    assert names(tmp_path) == []


def test_the_next_run_removes_what_a_killed_one_left_and_no_other_folder(tmp_path: Path) -> None:
    killed, running = writing(tmp_path), writing(tmp_path)
    try:
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
        assert len(names(tmp_path)) == 2
        with scratch_folder("work", tmp_path) as folder:
            rest = set(names(tmp_path)) - {folder.name}
            assert len(rest) == 1 and f".{running.pid}." in rest.pop()
    finally:
        running.kill()
        running.communicate()


def test_other_labels_other_names_and_links_stay(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / f"other.{gone()}.x.scratch").mkdir()
    (tmp_path / "work.x.scratch").mkdir()
    (tmp_path / f"work.{gone()}.x.scratch").symlink_to("precious")
    before = names(tmp_path)
    with scratch_folder("work", tmp_path):
        pass
    assert names(tmp_path) == before


def test_a_locked_folder_stays_although_no_process_here_has_its_number(tmp_path: Path) -> None:
    folder = tmp_path / f"work.{gone()}.x.scratch"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        assert lock(descriptor)
        with scratch_folder("work", tmp_path):
            assert folder.exists()
    finally:
        os.close(descriptor)
    with scratch_folder("work", tmp_path):
        assert not folder.exists()
