"""Folders for the time of one run; the next run removes those whose process was killed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.checkpoint.lock import is_alive, is_locked, lock

_NAME = re.compile(r"(?P<label>.+)\.(?P<process>\d+)\.[^.]+\.scratch")


@contextmanager
def scratch_folder(label: str, parent: str | Path | None = None) -> Iterator[Path]:
    """A new folder in ``parent`` (by default the system's for temporary files), removed at the end of the block.

    What earlier runs with this ``label`` left there when they were killed is removed first. OSError where the folder
    cannot be made.
    """
    place = Path(parent) if parent is not None else Path(tempfile.gettempdir())
    sweep(label, place)
    folder = Path(tempfile.mkdtemp(prefix=f"{label}.{os.getpid()}.", suffix=".scratch", dir=place))
    descriptor = None
    try:
        # a process of that number may live elsewhere, beside this file system: the lock says so
        if hasattr(os, "O_DIRECTORY"):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            lock(descriptor)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def sweep(label: str, place: Path) -> None:
    """Remove this user's scratch folders of a label whose process is gone; others stay."""
    for folder in place.glob("*.scratch"):
        parts = _NAME.fullmatch(folder.name)
        if parts and parts["label"] == label and not is_alive(int(parts["process"])):
            with contextlib.suppress(OSError):
                if not folder.is_symlink() and not is_locked(folder):
                    shutil.rmtree(folder, ignore_errors=True)
