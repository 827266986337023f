"""Run as a program: converts a checkpoint, and can kill itself (SIGKILL) at a given system call.

Usage: converting.py SOURCE OUT DIALECT SHARD_BYTES WORKERS KILL_AT [IMPORTANCE]; KILL_AT counts calls that write,
sync or rename (0: never), and the number of calls is printed at the end. With IMPORTANCE, weights are folded.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from halfbyte.calibration import calibration_of
from halfbyte.convert.conversion import convert
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from small_models import linear

COUNTED = ("pwrite", "write", "fsync", "replace", "link", "unlink", "rmdir")


def main() -> None:
    source, out, dialect, shard_bytes, threads, kill_at, *importance = sys.argv[1:]
    calls = 0
    lock = threading.Lock()

    def counted(call: Any) -> Any:
        def wrapped(*args: Any, **more: Any) -> Any:
            nonlocal calls
            with lock:
                calls += 1
                if calls == int(kill_at):
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)

        return wrapped

    for name in COUNTED:
        setattr(os, name, counted(getattr(os, name)))
    checkpoint = Checkpoint.open(source)
    known = calibration_of(importance[0], checkpoint.weights) if importance else None
    recipe = linear("nvfp4", transform="awq") if importance else linear("nvfp4")
    plan = make_plan(checkpoint, recipe, dialect, int(shard_bytes), calibration=known)
    convert(plan, out, threads=int(threads))
    print(calls)


if __name__ == "__main__":
    main()
