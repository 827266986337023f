"""``halfbyte card``: the model card of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.cli.output import print_json, say

SUMMARY = "write the model card of a checkpoint, with numbers only from results files"
EXAMPLES = """\
  halfbyte card ./out --results results.json
  halfbyte card ./out --results kl.json mmlu.json --base-model Qwen/Qwen3-8B --source ./Qwen3-8B
  halfbyte card ./out --results results.json --repository me/Qwen3-8B-NVFP4 -o card.md

The results must have been measured on this exact checkpoint; a hash of its contents identifies it.
To publish: hf upload OWNER/NAME ./out
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("out", metavar="OUT", help="folder of a quantized checkpoint")
    parser.add_argument("--results", metavar="FILE", nargs="+", required=True, help="output of `halfbyte evaluate -o`")
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="hub id of the source (default: as in the results)")
    parser.add_argument(
        "--source",
        metavar="SRC",
        help="folder or hub id whose card states licence and language (default: README.md in OUT)",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of SRC, if that is a hub id")
    parser.add_argument(
        "--repository", metavar="OWNER/NAME", help="name for the commands in the card (default: the folder)"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="default: README.md in OUT")


def run(args: argparse.Namespace) -> int:
    """Write the card; say what it lacks, and what it replaces."""
    from halfbyte.checkpoint import write_file_atomic
    from halfbyte.checkpoint.files import read_small
    from halfbyte.report.model_card import model_card
    from halfbyte.verify.checksums import update_checksum
    from halfbyte.verify.output_folder import CARD_MARK

    card = model_card(
        args.out,
        args.results,
        base_model=args.base_model,
        source=args.source,
        revision=args.revision,
        place=args.repository,
    )
    path = Path(args.output) if args.output else Path(args.out) / "README.md"
    replaced = path.is_file() and CARD_MARK.encode() not in read_small(path)
    write_file_atomic(path, card.text.encode())
    if path.parent.resolve() == Path(args.out).resolve():
        update_checksum(path.parent, path.name)
    if args.json:
        print_json({"file": path, "missing": card.missing, "replaced": replaced})
        return 0
    say(f"{path}: written{' in place of another card' if replaced else ''}")
    for line in card.missing:
        say(f"not in it   {line}")
    return 0
