"""``halfbyte convert``: a quantized checkpoint in another dialect."""

from __future__ import annotations

import argparse

from halfbyte.cli import options
from halfbyte.cli import quantize_command as quantize
from halfbyte.cli.human import parse_size

SUMMARY = "write a quantized checkpoint for another engine, with the same codes and scales"
EXAMPLES = """\
  halfbyte convert ./nvfp4-compressed-tensors ./nvfp4-modelopt --dialect modelopt --verify
  halfbyte convert openai/gpt-oss-20b ./gpt-oss-mlx --dialect mlx
  halfbyte convert ./mixfp4 ./nvfp4 --dialect compressed-tensors --requantize nvfp4

weights that the dialect cannot store are an error, unless --requantize gives them another format
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("source", metavar="SRC", help=options.SOURCE)
    parser.add_argument(
        "out", metavar="OUT", help="output folder: new, empty, or with an interrupted run of this conversion"
    )
    parser.add_argument("--dialect", metavar="D", required=True, help="layout of the output, see `halfbyte formats`")
    parser.add_argument("--requantize", metavar="FORMAT", help="format for weights that the dialect cannot store")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=parse_size,
        help="maximum size of a weight file (default: 5GB; GGUF: one file)",
    )
    options.add_revision(parser)
    options.add_cache(parser)
    quantize.add_execution(parser)


def run(args: argparse.Namespace) -> int:
    """Plan the conversion, write it and report it."""
    from halfbyte.api import respelling

    made = respelling(options.open_checkpoint(args), args.dialect, args.requantize, None, args.max_shard_size)
    return quantize.carry_out(made, args, "converting")
