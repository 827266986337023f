"""``halfbyte repair``: what an audit found, mended from the source."""

from __future__ import annotations

import argparse

from halfbyte.cli import options
from halfbyte.cli.output import print_json, progress, say

SUMMARY = "mend a quantized checkpoint from its source: missing parts, ignore lists, scales; all other bytes stay"
EXAMPLES = """\
  halfbyte audit ./model-NVFP4 --against ./model
  halfbyte repair ./model-NVFP4 ./mended --against ./model
  halfbyte repair ./model-NVFP4 ./mended --against ./model --files      tokenizer files of the source, too

exit code 1 means that problems are left, which are listed
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=f"the quantized checkpoint: {options.LOCAL}")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument("--against", metavar="SRC", required=True, help=f"its unquantized source: {options.LOCAL}")
    options.add_revision(parser)
    parser.add_argument("--files", action="store_true", help="take tokenizer files that differ from the source, too")


def run(args: argparse.Namespace) -> int:
    """Repair and say what was done; 1 if problems are left."""
    from halfbyte.audit.repair import repair, summary_of
    from halfbyte.checkpoint import Inventory

    total = sum(Inventory.open(args.checkpoint).files.values())
    with progress("writing", total, args.json) as report:
        result = repair(
            args.checkpoint,
            args.out,
            args.against,
            revision=args.revision,
            other_files=args.files,
            progress=report,
        )
    if result is None:
        if args.json:
            print_json({"repaired": False})
        else:
            say("there is nothing that a repair can mend; `halfbyte audit` lists what it found")
        return 0
    if args.json:
        print_json({"repaired": True, **result.record})
    else:
        say(f"before      {result.before.verdict}", f"after       {result.after.verdict}", *summary_of(result))
        for finding in result.after.problems:
            say(f"left        {finding.what}")
    return 0 if result.after.ok else 1
