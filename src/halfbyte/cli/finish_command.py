"""``halfbyte finish``: complete an output whose weight files workers have written."""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.cli import options
from halfbyte.cli.human import exact
from halfbyte.cli.output import print_json, say

SUMMARY = "complete an output that several workers have written (quantize --shard)"
EXAMPLES = """\
  halfbyte finish ./out

the last worker does the same by itself; run it in the folder, and with the files, of the workers' command
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("out", metavar="OUT", help="the output folder of all workers")


def run(args: argparse.Namespace) -> int:
    """Make the workers' plan again, and write what is lacking beside their files."""
    from halfbyte.checkpoint.lock import FOLDER
    from halfbyte.checkpoint.shared_journal import RUN, read_run
    from halfbyte.convert.workers import finish
    from halfbyte.errors import OutputError
    from halfbyte.plan.conversion_plan import PROVENANCE

    out = Path(args.out).expanduser()
    if (out / PROVENANCE).is_file() and not (out / FOLDER / RUN).exists():
        return _report(args, out, None)
    run_record = read_run(out)
    command = run_record.get("arguments")
    if not isinstance(command, dict) or "source" not in command:
        raise OutputError(f"{out} was begun from Python; complete it there with halfbyte.finish(plan, out)")
    made = options.plan_of(argparse.Namespace(**{**command, "json": args.json}))
    finish(made, out)
    return _report(args, out, made.repository_bytes)


def _report(args: argparse.Namespace, out: Path, size: int | None) -> int:
    if args.json:
        print_json({"out": str(out), "already_complete": size is None, "bytes": size})
    else:
        say(f"{out} is complete: {exact(size)}" if size is not None else f"{out} is already complete: nothing to do")
    return 0
