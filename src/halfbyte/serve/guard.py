"""Runs a server, and ends it with all its processes when the program that started the guard is gone.

A program of its own with the standard library alone: ``python guard.py COMMAND ...``. It is started as the leader of a
process group. Its standard input is a pipe that the parent holds open; the end of it, however the parent ended, ends
the group: SIGTERM first, SIGKILL after ``GRACE`` seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from types import FrameType

GRACE = 10.0


def main(command: list[str]) -> None:
    """Run the command until it ends or the parent is gone; never returns."""
    signal.signal(signal.SIGTERM, _stay)
    signal.signal(signal.SIGINT, _stay)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_wait_for_parent, args=(child,), daemon=True).start()
    code = child.wait()
    print(f"the server ended with exit code {code}", file=sys.stderr, flush=True)
    # workers that it left, and this process
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _wait_for_parent(child: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1024):
        pass
    os.killpg(os.getpgrp(), signal.SIGTERM)
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _stay(number: int, frame: FrameType | None) -> None:
    """A signal to the group is meant for the server; the guard outlives it."""


if __name__ == "__main__":
    main(sys.argv[1:])
