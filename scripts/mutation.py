"""Score the tests by mutation: small faults are put into the core one at a time, and the tests of that room must fail.

Usage: python scripts/mutation.py [--rooms formats search ...] [--each 35] [--seed 0] [--minutes 60] [--jobs 1]
       [--output RESULTS.json]
       python scripts/mutation.py --again RESULTS.json

Faults come from cosmic-ray's operators. Running all of them takes days, so a random sample is drawn from each room,
each module by the number of faults that it offers. The rooms take turns, so that a run that ``--minutes`` ends early
has judged about as many faults of each. A fault is judged by the test file of its module, then by the other tests of
the room, without the slow ones. ``--again`` judges only the survivors of an earlier run, by the
slow ones too. Nothing in the checkout changes: each worker mutates a copy of the package.
"""

from __future__ import annotations

import argparse
import itertools
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
from dataclasses import asdict, dataclass, replace
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
TIMEOUT = 900


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
    parser.add_argument("--each", type=int, default=35, help="faults per room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="judge no further fault after these")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the faults and their outcomes here, as they come")
    parser.add_argument("--again", type=Path, help="judge the survivors of this earlier output only")
    options = parser.parse_args()
    faults = survivors(options.again) if options.again else sample(options.rooms, options.each, options.seed)
    begin, judged_faults = time.monotonic(), []
    workers: Queue[Path] = Queue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for number in range(options.jobs):
            copy = Path(folder) / str(number) / "halfbyte"
            shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
            workers.put(copy)

        def judge_in_time(fault: Fault) -> Fault:
            return (
                judge(fault, workers, bool(options.again)) if time.monotonic() - begin < 60 * options.minutes else fault
            )

        for fault in filter(lambda f: f.outcome, pool.map(judge_in_time, faults)):
            judged_faults.append(fault)
            line = f"{fault.module}:{fault.line} {fault.operator.removeprefix('core/')}"
            print(f"{len(judged_faults)}/{len(faults)} {fault.outcome:8} {fault.seconds:5.0f} s  {line}", flush=True)
            if options.output:
                entries = [asdict(f) for f in judged_faults]
                document = {"seed": options.seed, "date": time.strftime("%Y-%m-%d"), "faults": entries}
                options.output.write_text(json.dumps(document, indent=1) + "\n")
    for room in (*options.rooms, ""):
        of_room = [f for f in judged_faults if f.module.startswith(room)]
        killed = sum(f.outcome != "survived" for f in of_room)
        print(f"{room or 'all':12} {killed} of {len(of_room)} noticed")
    return 0


def every_fault(room: str) -> Iterator[Fault]:
    """All faults that the operators offer in the modules of a room."""
    known = set(operator_names())
    for path in sorted((PACKAGE / room).rglob("*.py")):
        nodes = list(ast_nodes(get_ast(path.read_text())))
        for name in OPERATORS:
            if name not in known:
                raise SystemExit(f"cosmic-ray has no operator {name}; choose another release")
            operator = get_operator(name)()
            for occurrence in range(sum(len(list(operator.mutation_positions(node))) for node in nodes)):
                yield Fault(path.relative_to(PACKAGE).as_posix(), name, occurrence)


def sample(rooms: list[str], count: int, seed: int) -> list[Fault]:
    """Some faults of each room, the rooms in turn; the same for the same seed and source."""
    drawn = []
    for room in rooms:
        faults = list(every_fault(room))
        drawn.append(random.Random(f"{seed} {room}").sample(faults, min(count, len(faults))))
    return [fault for turn in itertools.zip_longest(*drawn) for fault in turn if fault]


def survivors(results: Path) -> list[Fault]:
    """The faults of an earlier run that no test noticed, found again by their lines where modules have changed."""
    entries = [Fault(**entry) for entry in json.loads(results.read_text())["faults"]]
    faults = [found_again(entry) for entry in entries if entry.outcome == "survived"]
    for entry in (entry for entry in entries if entry.outcome == "survived"):
        if not any((f.module, f.before, f.after) == (entry.module, entry.before, entry.after) for f in faults if f):
            print(f"gone     {entry.module}: {entry.before}")
    return [fault for fault in faults if fault]


def found_again(entry: Fault) -> Fault | None:
    """The fault of an earlier run in the module of today; None where its line is gone."""
    if not (PACKAGE / entry.module).is_file():
        return None
    for occurrence in range(10_000):
        fault = replace(entry, occurrence=occurrence, outcome="")
        if mutate(fault) is None:
            return None
        if (fault.before, fault.after) == (entry.before, entry.after):
            return fault
    return None


def mutate(fault: Fault) -> str | None:
    """The source of a module with a fault, whose place is noted in it; None where there is no such fault."""
    source = (PACKAGE / fault.module).read_text()
    mutated = mutate_code(source, get_operator(fault.operator)(), fault.occurrence)
    if mutated is None or mutated == source:
        return None
    lines = zip(source.splitlines(), mutated.splitlines(), strict=False)
    fault.line, before, after = next((i, a, b) for i, (a, b) in enumerate(lines, 1) if a != b)
    fault.before, fault.after = before.strip(), after.strip()
    return mutated


def judge(fault: Fault, workers: Queue[Path], slow: bool) -> Fault:
    """Put a fault into a worker's copy, run the tests, take it out again."""
    copy, begin = workers.get(), time.monotonic()
    path, mutated = copy / fault.module, mutate(fault)
    assert mutated is not None
    try:
        path.write_text(mutated)
        fault.outcome = outcome(fault.module, copy, slow)
    finally:
        path.write_text((PACKAGE / fault.module).read_text())
        workers.put(copy)
    fault.seconds = round(time.monotonic() - begin, 1)
    return fault


def outcome(module: str, copy: Path, slow: bool) -> str:
    """Run the tests of a module, then those of its room; the first that fails has noticed the fault."""
    room = REPOSITORY / "tests" / module.split("/")[0]
    own = room / f"test_{Path(module).name}"
    runs = [[str(own), "-m", "not slow"]] if own.is_file() else []
    runs.append([str(room), f"--ignore={own}", "-m", "not slow"])
    if slow:
        runs.append([str(room), "-m", "slow"])
    for arguments in runs:
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
