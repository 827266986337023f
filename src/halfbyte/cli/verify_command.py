"""``halfbyte verify``: a quantized checkpoint against its source."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from halfbyte.cli import accuracy, options
from halfbyte.cli.output import print_json, progress, say

if TYPE_CHECKING:
    from halfbyte.verify.weights import Verification

SUMMARY = "compare a quantized checkpoint with its source: everything there, kept tensors identical, errors in bounds"
EXAMPLES = """\
  halfbyte verify ./out --against ./Qwen3.5-35B-A3B
  halfbyte verify ./out --against Qwen/Qwen3-8B --revision main --json

exit code 1 means that problems were found; they are listed
"""
SHOWN = 20


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare options."""
    parser.add_argument("out", metavar="OUT", help="the quantized checkpoint")
    parser.add_argument("--against", metavar="SRC", required=True, help=f"its source: {options.SOURCE}")
    options.add_revision(parser)
    parser.add_argument(
        "--max-relmse",
        metavar="X",
        type=float,
        default=None,
        help="largest squared error of a weight relative to its sum of squares (default 0.1, or 0.5 with GPTQ)",
    )


def run(args: argparse.Namespace) -> int:
    """Compare and report; 1 if there are problems."""
    result = compare(args.out, args.against, args.revision, args.json, args.max_relmse)
    if args.json:
        print_json(document(result))
    else:
        accuracy.show(result.errors, result.relmse)
        say("")
        verdict(result)
    return 0 if result.ok else 1


def compare(out: str, against: str, revision: str | None, silent: bool, bound: float | None = None) -> Verification:
    """Verify under a progress bar."""
    from halfbyte.checkpoint import Inventory
    from halfbyte.verify.weights import MAX_RELMSE, verify

    with progress("verifying", Inventory.open(against, revision).total_bytes, silent) as report:
        return verify(out, against, revision, MAX_RELMSE if bound is None else bound, report)


def document(result: Verification) -> dict[str, Any]:
    """A verification as one JSON object."""
    return {
        "ok": result.ok,
        "out": result.out,
        "source": result.source,
        "problems": result.problems,
        "kept": result.kept,
        "quantized": result.quantized,
        "folded": result.folded,
        "dropped": result.dropped,
        "already_quantized": sum(bool(error.source) for error in result.errors),
        "lossless": result.lossless,
        "relmse": result.relmse,
        "accuracy": accuracy.by_role(result.errors),
        "weights": [
            {
                "name": error.name,
                "role": error.role,
                "format": error.format,
                "parameters": error.elements,
                "relmse": error.relmse,
                "max_error": error.max_error,
                "source_format": error.source or None,
                "lossless": error.lossless,
            }
            for error in result.errors
        ],
    }


def verdict(result: Verification) -> None:
    """The outcome in words."""
    dropped = f", {len(result.dropped)} left out" if result.dropped else ""
    counts = f"{result.quantized} weights quantized, {result.kept} kept byte for byte{dropped}"
    if result.folded:
        counts += f"; {result.folded} compared after what AWQ folded into them"
    already = sum(bool(error.source) for error in result.errors)
    if already:
        counts += f"; of {already} that the source holds quantized, {result.lossless} have exactly its values"
    if result.ok:
        say(f"verified: {counts}; relative error {result.relmse:.5f}")
        return
    say(f"{len(result.problems)} problem(s) found; {counts}:")
    say(*(f"  {problem}" for problem in result.problems[:SHOWN]))
    if len(result.problems) > SHOWN:
        say(f"  and {len(result.problems) - SHOWN} more; --json lists all")
