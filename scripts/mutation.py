"""Score the tests by mutation: small faults are put into the core one at a time, and the tests of that room must fail.

Usage: python scripts/mutation.py [--rooms formats search ...] [--sample 200] [--seed 0] [--jobs 1] [-o RESULTS.json]

Faults come from cosmic-ray's operators. Running all of them takes days, so a random sample is drawn, each module by
the number of faults that it offers. A fault is judged by the test file of its module; if that file passes, by the
other tests of the room. Nothing in the checkout changes: each worker mutates a copy of the package.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "src" / "halfbyte"
ROOMS = ("formats", "search", "plan", "convert", "verify", "checkpoint")
# of these operators a few stand for all: each arithmetic operator becomes one other, and so on
OPERATORS = (
    "core/AddNot",
    "core/ExceptionReplacer",
    "core/NumberReplacer",
    "core/ReplaceAndWithOr",
    "core/ReplaceBreakWithContinue",
    "core/ReplaceContinueWithBreak",
    "core/ReplaceFalseWithTrue",
    "core/ReplaceOrWithAnd",
    "core/ReplaceTrueWithFalse",
    "core/ReplaceBinaryOperator_Add_Sub",
    "core/ReplaceBinaryOperator_Sub_Add",
    "core/ReplaceBinaryOperator_Mul_Div",
    "core/ReplaceBinaryOperator_Div_Mul",
    "core/ReplaceBinaryOperator_FloorDiv_Mul",
    "core/ReplaceBinaryOperator_Mod_Add",
    "core/ReplaceBinaryOperator_BitAnd_BitOr",
    "core/ReplaceBinaryOperator_RShift_LShift",
    "core/ReplaceComparisonOperator_Eq_NotEq",
    "core/ReplaceComparisonOperator_NotEq_Eq",
    "core/ReplaceComparisonOperator_Lt_LtE",
    "core/ReplaceComparisonOperator_LtE_Lt",
    "core/ReplaceComparisonOperator_Gt_GtE",
    "core/ReplaceComparisonOperator_GtE_Gt",
    "core/ReplaceComparisonOperator_Is_IsNot",
    "core/ReplaceComparisonOperator_IsNot_Is",
    "core/ReplaceUnaryOperator_Delete_Not",
)
# beyond it a test is taken to hang, which counts as noticed
TIMEOUT = 240


@dataclass
class Fault:
    """One mutation of a module, and what became of it: killed, survived or timeout."""

    module: str
    operator: str
    occurrence: int
    line: int = 0
    before: str = ""
    after: str = ""
    outcome: str = ""
    seconds: float = 0.0


def main() -> int:
    """Draw the sample, judge each fault, print and write the score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", nargs="+", default=ROOMS, choices=ROOMS)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    faults = sample(list(every_fault(options.rooms)), options.sample, options.seed)
    workers: Queue[Path] = Queue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for number in range(options.jobs):
            copy = Path(folder) / str(number) / "halfbyte"
            shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
            workers.put(copy)
        for done, fault in enumerate(pool.map(lambda f: judged(f, workers), faults), 1):
            line = f"{fault.module}:{fault.line} {fault.operator.removeprefix('core/')}"
            print(f"{done}/{len(faults)} {fault.outcome:8} {fault.seconds:5.0f} s  {line}", flush=True)
    for room in options.rooms:
        mine = [f for f in faults if f.module.startswith(f"{room}/")]
        killed = sum(f.outcome != "survived" for f in mine)
        print(f"{room:12} {killed} of {len(mine)} noticed")
    killed = sum(f.outcome != "survived" for f in faults)
    print(f"{'all':12} {killed} of {len(faults)} noticed ({100 * killed / max(len(faults), 1):.0f} %)")
    if options.output:
        document = {"seed": options.seed, "date": time.strftime("%Y-%m-%d"), "faults": [asdict(f) for f in faults]}
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def every_fault(rooms: list[str]) -> Iterator[Fault]:
    """All faults that the operators offer in the modules of some rooms."""
    known = set(operator_names())
    for room in rooms:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            nodes = list(ast_nodes(get_ast(path.read_text())))
            for name in OPERATORS:
                if name not in known:
                    raise SystemExit(f"cosmic-ray has no operator {name}; choose another release")
                operator = get_operator(name)()
                for occurrence in range(sum(len(list(operator.mutation_positions(node))) for node in nodes)):
                    yield Fault(path.relative_to(PACKAGE).as_posix(), name, occurrence)


def sample(faults: list[Fault], count: int, seed: int) -> list[Fault]:
    """A part of the faults, in the order of the modules; the same for the same seed."""
    chosen = sorted(random.Random(seed).sample(range(len(faults)), min(count, len(faults))))
    return [faults[i] for i in chosen]


def judged(fault: Fault, workers: Queue[Path]) -> Fault:
    """Put a fault into a worker's copy, run the tests, take it out again."""
    copy = workers.get()
    path, source = copy / fault.module, (PACKAGE / fault.module).read_text()
    begin = time.monotonic()
    try:
        mutated = mutate_code(source, get_operator(fault.operator)(), fault.occurrence)
        lines = zip(source.splitlines(), mutated.splitlines(), strict=False)
        changed = [(i, a, b) for i, (a, b) in enumerate(lines, 1) if a != b]
        fault.line, fault.before, fault.after = (changed[0][0], changed[0][1].strip(), changed[0][2].strip())
        path.write_text(mutated)
        fault.outcome = outcome(fault.module, copy)
    finally:
        path.write_text(source)
        workers.put(copy)
    fault.seconds = round(time.monotonic() - begin, 1)
    return fault


def outcome(module: str, copy: Path) -> str:
    """Run the tests of a module, then those of its room; the first that fails has noticed the fault."""
    room = REPOSITORY / "tests" / module.split("/")[0]
    own = room / f"test_{Path(module).name}"
    for arguments in ([str(own)] if own.is_file() else [], [str(room), f"--ignore={own}"]):
        if not arguments:
            continue
        environment = {**os.environ, "PYTHONPATH": str(copy.parent), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
        try:
            done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return "timeout"
        if done.returncode not in (0, 5):
            return "killed"
    return "survived"


if __name__ == "__main__":
    raise SystemExit(main())
