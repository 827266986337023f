"""``--shard``: which part of the files this process writes, and what it says of it."""

from __future__ import annotations

import argparse
import os
import re
from typing import TYPE_CHECKING, Any

from halfbyte.cli import options
from halfbyte.cli.output import print_json, progress, say
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.plan.conversion_plan import Plan

NUMBERS = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "SKYPILOT_NODE_RANK")
"""Where schedulers say which of several equal processes this one is, counted from 0."""
# what decides neither plan nor output
_OF_THIS_PROCESS = ("shard", "threads", "memory", "json", "verify", "dry_run", "resume", "plugin", "command")


def add_shard(parser: argparse.ArgumentParser) -> None:
    """Add the option --shard to a parser."""
    parser.add_argument(
        "--shard",
        metavar="I/N",
        type=parse_shard,
        help="write only the files of worker I (from 0) of N, beside other workers; auto/N takes I from the scheduler "
        f"({', '.join(NUMBERS)})",
    )


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``I/N`` or ``auto/N``."""
    match = re.fullmatch(r"(\d{1,6}|auto)/(\d{1,6})", text, re.ASCII)
    if not match or not int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 0/16, or auto/N")
    number = match[1]
    if number == "auto":
        number = next((os.environ[name] for name in NUMBERS if os.environ.get(name, "").isdecimal()), "")
        if not number:
            raise argparse.ArgumentTypeError(f"auto/{match[2]} needs one of {', '.join(NUMBERS)} in the environment")
    if int(number) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"there is no worker {number} of {match[2]}; they are counted from 0")
    return int(number), int(match[2])


def check(args: argparse.Namespace) -> None:
    """Refuse options that need the whole output, or that every worker would do again."""
    for option in ("verify", "keep_going"):
        if getattr(args, option, False):
            name = option.replace("_", "-")
            raise HalfbyteError(f"--{name} needs the whole output, and --shard writes a part; leave one out")
    if options.calibration_texts(args):
        raise HalfbyteError(
            "with --shard every worker would calibrate again; run `halfbyte calibrate` once and give its folder"
        )


def write_shard(made: Plan, args: argparse.Namespace) -> int:
    """Write this worker's files, and complete the output if they were the last ones."""
    from halfbyte.convert.output_folder_state import source_identity
    from halfbyte.convert.workers import convert_files, files_of, finish_if_last, missing_files
    from halfbyte.plan.resources import item_bytes

    worker, workers = args.shard
    names = files_of(made, worker, workers)
    total = sum(item_bytes(item) for shard in made.shards if shard.name in names for item in shard.items)
    source = source_identity(made)  # once: it reads samples of every file
    with progress(f"worker {worker} of {workers}", total, args.json) as report:
        done = convert_files(made, args.out, names, args.threads, report, args.memory, recorded(args), source)
    complete = done.already_complete or finish_if_last(made, args.out, source)
    left = [] if complete else missing_files(made, args.out, source)
    document = {
        "out": str(done.out),
        "worker": worker,
        "workers": workers,
        "files": names,
        "reused": done.resumed_shards,
        "seconds": done.seconds,
        "complete": complete,
        "missing": left,
    }
    if args.json:
        print_json(document)
    else:
        say(
            f"worker {worker} of {workers}: {len(names)} of {len(made.shards)} weight files, {done.resumed_shards} of "
            f"them finished before, {done.seconds:.1f} s",
            f"{done.out} is complete" if complete else f"{len(left)} weight files of {done.out} are not finished yet",
        )
    return 0


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the plan, for ``halfbyte finish``."""
    values = {name: value for name, value in vars(args).items() if name not in _OF_THIS_PROCESS}
    return {name: value for name, value in values.items() if isinstance(value, str | int | float | bool | list | None)}
