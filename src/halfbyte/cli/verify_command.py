"""``halfbyte verify``: a quantized checkpoint against its checksums and its source."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.cli import accuracy, options
from halfbyte.cli.output import print_json, progress, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from halfbyte.verify.weights import Verification

SUMMARY = "check a quantized checkpoint: every file against its SHA-256, every weight against the source"
EXAMPLES = """\
  halfbyte verify ./out                                     every file is unchanged; needs no source
  halfbyte verify ./out --against ./Qwen3.5-35B-A3B         kept tensors identical, errors in bounds
  halfbyte verify ./out --against Qwen/Qwen3-8B --revision main --json

exit code 1 means that problems were found; they are listed
"""
SHOWN = 20


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("out", metavar="OUT", help="the quantized checkpoint")
    parser.add_argument("--against", metavar="SRC", help=f"source to compare with: {options.SOURCE}")
    options.add_revision(parser)
    options.add_cache(parser)
    parser.add_argument(
        "--max-relmse",
        metavar="X",
        type=float,
        default=None,
        help="maximum squared error of a weight over its sum of squares (default 0.1; 0.25 in 3 bits, 0.5 in 2 bits or "
        "with GPTQ)",
    )


def run(args: argparse.Namespace) -> int:
    """Compare and report; 1 if there are problems."""
    result = compare(args.out, args.against, args.revision, args.json, args.max_relmse, args.cache)
    if args.json:
        print_json(document(result))
    else:
        if result.wrong_source:
            say(result.wrong_source, "")
        if result.errors:
            accuracy.show(result.errors, result.relmse)
            say("")
        verdict(result)
    return 0 if result.ok else 1


def compare(
    out: str,
    against: str | None,
    revision: str | None,
    silent: bool,
    bound: float | None = None,
    cache: bool = False,
) -> Verification:
    """Verify under a progress bar."""
    from halfbyte.stores.open_source import open_inventory
    from halfbyte.verify.checksums import stated_bytes
    from halfbyte.verify.weights import MAX_RELMSE, verify

    inventory = open_inventory(against, revision, cache) if against else None
    total = stated_bytes(Path(out)) + (inventory.total_bytes if inventory else 0)
    with progress("verifying", total, silent) as report:
        return verify(out, against, revision, MAX_RELMSE if bound is None else bound, report, cache, inventory)


def document(result: Verification) -> dict[str, Any]:
    """A verification as one JSON object."""
    return {
        "ok": result.ok,
        "out": result.out,
        "source": result.source,
        "wrong_source": result.wrong_source or None,
        "problems": result.problems,
        "checksums": {
            "stated": result.checksums.stated,
            "files": result.checksums.files,
            "bytes": result.checksums.bytes,
            "other_files": result.checksums.others,
        },
        "recomputed": result.recomputed,
        "kept": result.kept,
        "quantized": result.quantized,
        "folded": result.smoothed,
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
                "calibrated_relmse": error.calibrated_relmse,
                "max_error": error.max_error,
                "source_format": error.source or None,
                "lossless": error.lossless,
            }
            for error in result.errors
        ],
    }


def verdict(result: Verification) -> None:
    """Print the outcome of a verification in words."""
    parts = [*_weights(result), *_checksums(result)]
    if result.ok:
        error = f"; relative error {result.relmse:.5f}" if result.errors else ""
        say(f"verified: {'; '.join(parts)}{error}")
    else:
        say(f"{len(result.problems)} problem(s) found; {'; '.join(parts)}:" if parts else "problems found:")
        say(*(f"  {problem}" for problem in result.problems[:SHOWN]))
        if len(result.problems) > SHOWN:
            say(f"  and {len(result.problems) - SHOWN} more; --json lists all")
    if result.checksums.others:
        names = ", ".join(result.checksums.others[:5])
        say(f"not written by the conversion, not checked: {names}{', ...' if result.checksums.others[5:] else ''}")


def _checksums(result: Verification) -> Iterator[str]:
    checked = result.checksums
    if checked.stated and not checked.problems:
        yield f"all {checked.files} files have the SHA-256 recorded when they were written"
    elif result.recomputed and result.ok:
        yield "there are no checksums, but every quantized weight is what the recorded recipe gives"


def _weights(result: Verification) -> Iterator[str]:
    if result.source is None:
        return
    dropped = f", {len(result.dropped)} left out" if result.dropped else ""
    yield f"{result.quantized} weights quantized, {result.kept} kept byte for byte{dropped}"
    if result.smoothed:
        yield f"{result.smoothed} compared with their AWQ scales applied to the source"
    already = sum(bool(error.source) for error in result.errors)
    if already:
        rounded = f", {result.rounded} its codes and block scales with a rounded global scale" if result.rounded else ""
        yield f"of {already} already quantized in the source, {result.lossless} have exactly its values{rounded}"
