"""``halfbyte apply``: a tuned checkpoint from its base and a patch."""

from __future__ import annotations

import argparse

from halfbyte.cli.human import size
from halfbyte.cli.output import print_json, progress, say

SUMMARY = "make a tuned checkpoint from its base and a patch of `halfbyte diff`, exact to the bit"
EXAMPLES = """\
  halfbyte apply ./base-NVFP4 tuned.patch.safetensors ./tuned-NVFP4

the base is checked before, and every file afterwards, by SHA-256; an interrupted run continues
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("base", metavar="BASE", help="the folder that the patch was made from")
    parser.add_argument("patch", metavar="PATCH", help="a file that `halfbyte diff` wrote")
    parser.add_argument("out", metavar="OUT", help="a new folder")


def run(args: argparse.Namespace) -> int:
    """Apply the patch and say what was written."""
    from halfbyte.checkpoint import Inventory
    from halfbyte.patch.apply_patch import apply_patch
    from halfbyte.patch.manifest import read_manifest

    total = sum(target.size for target in read_manifest(Inventory.open(args.patch)).targets)
    with progress("writing", total, args.json) as report:
        made = apply_patch(args.base, args.patch, args.out, report)
    if args.json:
        print_json({**vars(made), "out": str(made.out)})
        return 0
    resumed = f", {made.resumed} of them from an interrupted run" if made.resumed else ""
    say(f"{made.out}: {len(made.files)} files, {size(made.nbytes)}, each with the SHA-256 of the patch{resumed}")
    return 0
