"""``halfbyte generate``: what a model writes behind a text."""

from __future__ import annotations

import argparse
import sys

from halfbyte.cli.generation_options import add_generation, described, document, prepared
from halfbyte.cli.human import clean
from halfbyte.cli.output import print_json

SUMMARY = "continue a text with a model, on this machine"
EXAMPLES = """\
  halfbyte generate ./out --prompt "The capital of France is"
  halfbyte generate ./out --prompt "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 7
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare options."""
    add_generation(parser, 0.0)
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the text to continue; - reads it from stdin")


def run(args: argparse.Namespace) -> int:
    """Load, write piece by piece, say how fast."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    generator, sampling = prepared(args)
    pieces = []
    for piece in generator.complete(prompt, sampling):
        pieces.append(piece)
        if not args.json:
            print(clean(piece, keep="\n\t"), end="", flush=True)
    if args.json:
        print_json(document("".join(pieces), generator.counts))
    else:
        print()
        print(described(generator.counts), file=sys.stderr)
    return 0
