"""``halfbyte errors``: how far each quantized tensor is from its source."""

from __future__ import annotations

import argparse
from typing import Any

from halfbyte.cli import options
from halfbyte.cli.accuracy import WEIGHTED
from halfbyte.cli.human import size
from halfbyte.cli.json_files import write_json
from halfbyte.cli.output import print_json, progress, say, table

SUMMARY = "measure the error of every quantized tensor against the source, without running the model"
EXAMPLES = """\
  halfbyte errors ./out --against ./Qwen3.5-35B-A3B
  halfbyte errors ./out --against ./model --importance imatrix.gguf --weights
  halfbyte errors ./out --against ./model --json > errors.json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("out", metavar="OUT", help="a quantized checkpoint, in any dialect")
    parser.add_argument("--against", metavar="SRC", required=True, help="the source of the checkpoint")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of SRC, if that is a hub id")
    parser.add_argument(
        "--importance",
        metavar="FILE",
        help="importance file (halfbyte's or llama.cpp's) that weights the error of each column",
    )
    parser.add_argument(
        "--weights", action="store_true", help="one line per weight, worst first, instead of one per class"
    )
    options.add_threads(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the JSON document to this file")


def run(args: argparse.Namespace) -> int:
    """Measure the errors and print them."""
    from halfbyte.evaluate.errors_document import tensor_errors

    with progress("comparing", _elements(args.out) if not args.json else 0, args.json) as report:
        document = tensor_errors(args.out, args.against, args.importance, args.revision, args.threads, report)
    if args.output:
        write_json(args.output, document)
    if args.json:
        print_json(document)
    else:
        _show(document, args.weights)
    return 0


def _elements(out: str) -> int:
    import math

    from halfbyte.source.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(out)
    return sum(math.prod(w.shape) for w in checkpoint.weights if w.name in checkpoint.formats)


def _show(document: dict[str, Any], every: bool) -> None:
    weighted, calibrated = document["importance"] is not None, document["total"]["calibrated_relmse"] is not None
    columns = ["weight" if every else "role", "format", ">parameters", ">size", ">relMSE", ">SQNR dB"]
    columns += [">weighted relMSE"] if weighted else []
    columns += [f">{WEIGHTED}"] if calibrated else []
    columns += [">largest error", ">saturated blocks", "blocks by codebook"]
    entries = sorted(document["weights"], key=lambda w: -(w["relmse"] or 0)) if every else document["classes"]
    lines = [[e["name" if every else "role"], e["format"], *_numbers(e, weighted, calibrated)] for e in entries]
    table(columns, lines, ["all", "", *_numbers(document["total"], weighted, calibrated)])
    kept = document["kept"]
    if calibrated:
        say("", f"{WEIGHTED}: error of outputs on the calibration text, which the conversion made small and noted")
    say("", f"not quantized: {kept['weights']:,} weights, {kept['parameters']:,} parameters, {size(kept['bytes'])}")


def _numbers(entry: dict[str, Any], weighted: bool, calibrated: bool) -> list[str]:
    cells = [f"{entry['parameters']:,}", size(entry["bytes"]), _number(entry["relmse"], ".5f")]
    cells.append(_number(entry["sqnr_db"], ".2f"))
    if weighted:
        cells.append(_number(entry["weighted_relmse"], ".5f"))
    if calibrated:
        cells.append(_number(entry["calibrated_relmse"], ".5f"))
    shares = [f"{share:.0%} {name}" for name, share in entry["tables"].items()]
    cells += [f"{entry['max_error']:.4g}", f"{entry['saturated_blocks']:.2%}"]
    return [*cells, ", ".join(shares[:1] if len(shares) == 2 else shares)]


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
