"""Commands that are killed at the n-th call that writes, and run again: the result has the same bytes.

``python -m fuzz.crash_points --kills 150 --seed 0``; exit code 1 where it has not. Each command runs in a process of
its own (a fork), in which the functions of ``os`` that write, sync, rename or remove are counted. At the drawn number
the process kills itself (SIGKILL), or gets "no space left" from that call, or is told to end (SIGTERM) right after it;
then no unfinished file may be left. The same command runs undisturbed into the same place, and all of its files are
compared with those of an undisturbed run; nothing may be left among the temporary files either.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import halfbyte
from fuzz import corpus
from halfbyte.cli import main as cli
from halfbyte.demo import MODEL

COUNTED = (
    "open",
    "write",
    "pwrite",
    "fsync",
    "replace",
    "rename",
    "link",
    "unlink",
    "mkdir",
    "rmdir",
    "posix_fallocate",
)
WRITING = os.O_WRONLY | os.O_RDWR
WAYS = ("kill", "end", "kill", "fail")
UNFINISHED = (".partial", ".scratch")
SHARES = {"quantize": 8, "convert": 8, "calibrate": 2, "allocate": 1, "evaluate": 1, "report": 1, "card": 1}
"""Kills of each command in 22: those that run models take much longer."""
# what says when and how long, not what was found
VOLATILE = {"created", "seconds", "command", "environment", "memory", "time", "started"}


def main(argv: Sequence[str] | None = None) -> int:
    """Kill every command at random places and compare what its rerun gives."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.crash_points", description=__doc__)
    parser.add_argument("--kills", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", action="append", choices=list(SHARES), help="only this one; may be repeated")
    args = parser.parse_args(argv)
    rng, lost, total = random.Random(args.seed), 0, 0
    chosen = args.command or list(SHARES)
    with tempfile.TemporaryDirectory(prefix="halfbyte-kills-") as base:
        commands = _commands(Path(base))
        if {"calibrate", "allocate", "evaluate"} & set(chosen):
            import halfbyte.calibrate.collect
            import halfbyte.evaluate.evaluation  # noqa: F401  loaded once, not in every fork
        for name in chosen:
            share = sum(SHARES[command] for command in chosen)
            count = max(1, round(args.kills * SHARES[name] / share))
            missed = _kill(name, commands[name], count, rng, Path(base))
            lost, total = lost + len(missed), total + count
            print(f"{name:10} {count - len(missed)} of {count} with identical bytes", *missed, flush=True)
    print(f"{total - lost} of {total} interrupted runs end with identical bytes, seed {args.seed}")
    return 1 if lost else 0


def _commands(base: Path) -> dict[str, Callable[[Path], list[str]]]:
    """The arguments of each command, for the folder that it writes to."""
    source = corpus.model(base / "source")
    halfbyte.quantize(str(source), base / "quantized", "nvfp4", dialect="compressed-tensors")
    text = base / "text.txt"
    text.write_text((MODEL / "heldout.txt").read_text()[:6000])
    results, quantized = base / "results.json", str(base / "demo")
    halfbyte.quantize(str(MODEL), quantized, "mxfp4")
    if cli(["evaluate", quantized, "-o", str(results), "--text", str(text), "--max-tokens", "128", "--length", "64"]):
        raise SystemExit("the quantized demo model cannot be evaluated")
    converted, small = str(base / "quantized"), ("--max-shard-size", "20KB", "--threads", "1")
    measured = ("--text", str(text), "--max-tokens", "128", "--length", "64")
    calibrated = ("--text", str(text), "--samples", "4", "--length", "64")
    demo = str(MODEL)
    return {
        "quantize": lambda out: ["quantize", str(source), str(out / "o"), "--recipe", "mixfp4", *small],
        "convert": lambda out: ["convert", converted, str(out / "o"), "--dialect", "modelopt", *small],
        "calibrate": lambda out: ["calibrate", demo, str(out / "o"), *calibrated],
        "allocate": lambda out: ["allocate", demo, "--bits", "9", "-o", str(out / "r.yaml"), *measured],
        "report": lambda out: ["report", str(results), "-o", str(out / "report.html")],
        "card": lambda out: ["card", quantized, "--results", str(results), "-o", str(out / "README.md")],
        "evaluate": lambda out: ["evaluate", demo, "--cache", str(out / "c"), "-o", str(out / "r.json"), *measured],
    }


def _kill(name: str, arguments: Callable[[Path], list[str]], count: int, rng: random.Random, base: Path) -> list[str]:
    """Places of a command after which the rerun gave other bytes."""
    whole, temporary = base / f"{name}-whole", base / "temporary"
    whole.mkdir()
    temporary.mkdir(exist_ok=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None
    undisturbed = _child(arguments(whole), 0, "kill", base)
    calls = undisturbed.calls
    if undisturbed.code or not calls:
        raise SystemExit(f"{name} ends with {undisturbed.code} undisturbed, after {calls} calls: {undisturbed.errors}")
    wanted, missed = _hashes(whole), []
    for number in range(count):
        out = base / f"{name}-{number}"
        out.mkdir()
        point, how = rng.randint(1, calls), WAYS[number % len(WAYS)]
        ended = _child(arguments(out), point, how, base)
        left = [path.name for path in (*out.rglob("*"), *temporary.iterdir()) if path.name.endswith(UNFINISHED)]
        right = {"kill": ended.code == -signal.SIGKILL, "end": ended.code == 130 and not left, "fail": not left}[how]
        if not right or "Traceback" in ended.errors:
            missed.append(f"{how} at call {point} of {calls}: exit {ended.code} {ended.errors[-200:]!r}, left {left}")
        again = _child(arguments(out), 0, "kill", base)
        if again.code or _hashes(out) != wanted or any(temporary.iterdir()):
            missed.append(f"{how} at call {point} of {calls}: exit {again.code} {again.errors[-200:]!r}")
        shutil.rmtree(out)
    return missed


class Ended(NamedTuple):
    """How a command ended: its exit code or, negative, its signal; its calls; what it said on stderr."""

    code: int
    calls: int
    errors: str


def _child(arguments: list[str], point: int, how: str, base: Path) -> Ended:
    """Run a command in a fork of this process, in which everything is loaded already."""
    said, counted = base / "stderr", base / "calls"
    counted.write_text("0")
    child = os.fork()
    if not child:
        code = 99
        try:
            with open(said, "wb", buffering=0) as errors, open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(errors.fileno(), 2)
            calls = disturb(point, how)
            code = cli(arguments)
            counted.write_text(str(calls()))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), int(counted.read_text()), said.read_text(errors="replace"))


def _hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder; JSON without what depends on the clock and on the folder's name."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes().replace(str(folder).encode(), b"")
        if path.suffix == ".json":
            content = json.dumps(_steady(json.loads(content)), sort_keys=True).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(entry) for key, entry in value.items() if key not in VOLATILE}
    return [_steady(entry) for entry in value] if isinstance(value, list) else value


def disturb(point: int, how: str) -> Callable[[], int]:
    """Count the calls of this process that write, and disturb the one with a number; returns the counter."""
    calls, lock = 0, threading.Lock()

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            nonlocal calls
            if name == "open" and not (len(args) > 1 and args[1] & WRITING):
                return call(*args, **more)
            with lock:
                calls += 1
                now = calls == point
            if now and how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if now and how == "fail" and name not in ("unlink", "rmdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                return call(*args, **more)
            finally:
                if now and how == "end":
                    os.kill(os.getpid(), signal.SIGTERM)

        return wrapped

    for name in COUNTED:
        if hasattr(os, name):
            setattr(os, name, counted(name, getattr(os, name)))
    return lambda: calls


if __name__ == "__main__":
    sys.exit(main())
