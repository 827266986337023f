"""``halfbyte audit``: what is wrong with anybody's quantized checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli import options
from halfbyte.cli.output import print_json, say, steps, table

if TYPE_CHECKING:
    from halfbyte.audit.run_audit import Audit

SUMMARY = "find what is wrong with a quantized checkpoint, whoever made it"
EXAMPLES = """\
  halfbyte audit ./model-NVFP4                              configuration, files and every scale; needs no source
  halfbyte audit ./model-NVFP4 --against ./model            and every weight beside its source
  halfbyte audit ./model-NVFP4 --against ./model --html audit.html --badge audit.svg

exit code 1 means that problems were found: wrong (an engine refuses it or computes other numbers), missing, or poor
(worse than the format can be); notes are no problems
"""
_WEIGHTS = 8


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=f"the quantized checkpoint: {options.LOCAL}")
    parser.add_argument("--against", metavar="SRC", help=f"its source: {options.LOCAL}")
    options.add_revision(parser)
    parser.add_argument(
        "--rows",
        metavar="N",
        type=int,
        default=256,
        help="rows of each weight to compare with the source (default 256)",
    )
    parser.add_argument("--html", metavar="FILE", help="also write a page")
    parser.add_argument("--badge", metavar="FILE", help="also write a badge (SVG)")


def run(args: argparse.Namespace) -> int:
    """Audit and print; 1 if there are problems."""
    from halfbyte.audit.badge import badge
    from halfbyte.audit.run_audit import audit
    from halfbyte.checkpoint import write_file_atomic
    from halfbyte.errors import HalfbyteError

    if args.rows < 1:
        raise HalfbyteError(f"--rows must be at least 1, not {args.rows}")
    if args.html:
        from halfbyte.audit.audit_page import page  # first, since it may need a package that is not installed
    with steps("comparing weights", args.json or not args.against) as report:
        result = audit(args.checkpoint, args.against, revision=args.revision, rows=args.rows, progress=report)
    if args.html:
        write_file_atomic(Path(args.html), page(result).encode())
    if args.badge:
        write_file_atomic(Path(args.badge), badge(result).encode())
    if args.json:
        print_json(result.document())
    else:
        show(result)
    return 0 if result.ok else 1


def show(result: Audit) -> None:
    """Print the verdict, the findings, what breaks where, and the worst weights."""
    say(result.verdict, "")
    for finding in result.findings:
        say(f"{finding.severity:<8}{finding.what}")
        if finding.advice:
            say(f"{'':8}{finding.advice}")
        if finding.seen:
            say(f"{'':8}reported as {', '.join(finding.seen)}")
    if result.findings:
        say("")
    for engine, reasons in result.breaks.items():
        say(f"{engine}: {'; '.join(reasons)}")
    worst = sorted(result.compared, key=lambda w: -w.worse_db)[:_WEIGHTS]
    if worst:
        say("")
        rows = [(w.name, w.format, f"{w.relmse:.5f}", f"{w.nearest:.5f}", f"{w.worse_db:+.1f} dB") for w in worst]
        table(("worst weights", "format", ">relMSE", ">rounded to nearest", ">difference"), rows)
