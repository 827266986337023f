"""The driver: ``python -m fuzz --seconds N --seed S``; exit code 1 where a case is a finding.

A finding is an exception that is no HalfbyteError, a case that takes more than 2 s of CPU time, a growth of memory
beyond 1 GB, or the death of the process. Each target runs in a process of its own; the case that it is at lies in a
file, so that it is known whatever happens. A case depends on seed, target and number alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuzz.targets import Target, targets
from halfbyte.errors import HalfbyteError

CPU_SECONDS = 2.0
GROWTH_BYTES = 1 << 30
SHOWN = 5


class HangError(Exception):
    """A case took more than its CPU time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz all targets, or those that are named, and report cases per target."""
    args = _arguments(argv)
    base = Path(tempfile.mkdtemp(prefix="halfbyte-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        chosen = [t for t in targets(base) if not args.target or t.name in args.target]
        share = args.seconds / max(sum(t.share for t in chosen), 1)
        reports = [_isolated(t, args.seed, share * t.share, args.cases, base) for t in chosen]
    finally:
        shutil.rmtree(base, ignore_errors=True)
    total = {"cases": sum(r["cases"] for r in reports), "findings": sum(len(r["findings"]) for r in reports)}
    for report in reports:
        print(
            f"{report['target']:36} {report['cases']:9,} cases  {report['refused']:9,} refused  slowest "
            f"{report['slowest']:.3f} s  growth {report['growth'] / 1e6:6.1f} MB  {len(report['findings'])} findings"
        )
        for finding in report["findings"][:SHOWN]:
            print(f"  case {finding['case']}: {finding['what']}")
    print(f"{total['cases']:,} cases, seed {args.seed}, {total['findings']} findings")
    if args.output:
        Path(args.output).write_text(json.dumps({"seed": args.seed, **total, "targets": reports}, indent=1) + "\n")
    return 1 if total["findings"] else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="wall time for all targets together (default 60)")
    parser.add_argument("--cases", type=int, help="at most so many cases for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="only this target; may be repeated")
    parser.add_argument("--output", metavar="FILE.json", help="also write the report here")
    return parser.parse_args(argv)


def _isolated(target: Target, seed: int, seconds: float, cases: int | None, base: Path) -> dict[str, Any]:
    """Run a target in a child; what is known of it even if the child dies."""
    report, current = base / "report.json", base / "case"
    report.unlink(missing_ok=True)
    current.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        code = 1
        try:
            report.write_text(json.dumps(_run(target, seed, seconds, cases, current)))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if report.exists():
        return dict(json.loads(report.read_text()))
    number = int(current.read_text()) if current.exists() else 0
    what = f"the process ended with {status} ({signal.strsignal(status & 0x7F) or 'exit'})"
    found = [{"case": number, "what": what}]
    return {"target": target.name, "cases": number, "refused": 0, "slowest": 0.0, "growth": 0, "findings": found}


def _run(target: Target, seed: int, seconds: float, cases: int | None, current: Path) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _hang)
    warnings.simplefilter("error")
    until, before = time.monotonic() + seconds, _peak()
    refused, slowest, number = 0, 0.0, 0
    findings: list[dict[str, Any]] = []
    while time.monotonic() < until and number != cases:
        if number % 100 == 0:
            current.write_text(str(number))
        case = target.make(random.Random(f"{seed}/{target.name}/{number}"))
        began, peak = time.process_time(), _peak()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            target.check(case)
        except HalfbyteError:
            refused += 1
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__} at {os.path.basename(place.filename)}:{place.lineno}: {str(error)[:200]}"
            findings.append({"case": number, "what": what, "bytes": case[:4000].hex()})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - began)
        if _peak() - peak > GROWTH_BYTES:
            findings.append({"case": number, "what": f"memory grew by {(_peak() - peak) >> 20} MiB"})
        number += 1
    return {
        "target": target.name,
        "cases": number,
        "refused": refused,
        "slowest": slowest,
        "growth": _peak() - before,
        "findings": findings,
    }


def _hang(*_: object) -> None:
    raise HangError(f"more than {CPU_SECONDS} s of CPU time")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


if __name__ == "__main__":
    sys.exit(main())
