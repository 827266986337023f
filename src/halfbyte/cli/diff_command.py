"""``halfbyte diff``: what a fine-tuned checkpoint has otherwise than its base, as one small file."""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.cli.human import size
from halfbyte.cli.output import print_json, progress, say

SUMMARY = "write what a tuned checkpoint has otherwise than its base, as one small file"
EXAMPLES = """\
  halfbyte diff ./base-NVFP4 ./tuned-NVFP4 -o tuned.patch.safetensors
  halfbyte apply ./base-NVFP4 tuned.patch.safetensors ./tuned-NVFP4

both are local checkpoints in the same dialect; needs a compressor: pip install 'halfbyte[patch]'
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("base", metavar="BASE", help="a folder that those who apply the patch have")
    parser.add_argument("tuned", metavar="TUNED", help="the folder that they will get")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the patch, a .safetensors file")


def run(args: argparse.Namespace) -> int:
    """Write the patch and say how large it is."""
    from halfbyte.checkpoint import Inventory
    from halfbyte.errors import HalfbyteError
    from halfbyte.patch.make_patch import make_patch

    if Path(args.output).suffix != ".safetensors":
        raise HalfbyteError(f"{args.output} should end in .safetensors, which patches are")
    total = sum(Inventory.open(args.tuned).files.values())
    with progress("comparing", total, args.json) as report:
        made = make_patch(args.base, args.tuned, args.output, report)
    if args.json:
        print_json({**vars(made), "path": str(made.path)})
        return 0
    share = made.nbytes / max(made.target_bytes, 1)
    say(
        f"{made.path}: {size(made.nbytes)}, {share:.1%} of {size(made.target_bytes)}",
        f"{made.changed_tensors:,} tensors differ, {made.same_tensors:,} are the same; {made.same_files:,} files are "
        "those of the base",
    )
    return 0
