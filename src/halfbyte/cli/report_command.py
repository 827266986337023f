"""``halfbyte report``: results as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.cli.human import size
from halfbyte.cli.output import print_json, say

SUMMARY = "write results as one HTML file with tables, charts and provenance; it needs no network"
EXAMPLES = """\
  halfbyte report results.json -o report.html
  halfbyte report ./results -o report.html
  halfbyte report results.json mmlu.json model-nvfp4.sensitivity.jsonl allocation.json -o report.html

needs a plotting library: pip install 'halfbyte[report]'
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="JSON output of evaluate, errors, sensitivity or allocate, or a folder of such files",
    )
    parser.add_argument("-o", "--output", metavar="FILE", default="report.html", help="default: report.html")


def run(args: argparse.Namespace) -> int:
    """Write the page and say what it was made from."""
    from halfbyte.errors import HalfbyteError
    from halfbyte.report import write_report

    if Path(args.output).suffix not in (".html", ".htm"):
        raise HalfbyteError(f"{args.output} should end in .html, as pages do")
    inputs = write_report(args.paths, args.output)
    if args.json:
        print_json({"file": args.output, "files": inputs.files, "ignored": inputs.ignored})
        return 0
    for path in inputs.ignored:
        say(f"ignored     {path}: no document of halfbyte")
    say(f"{args.output}: {size(Path(args.output).stat().st_size)}, from {', '.join(map(str, inputs.files))}")
    return 0
