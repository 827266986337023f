"""``halfbyte demo``: the bundled model in six recipes, verified and compared, offline."""

from __future__ import annotations

import argparse
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.cli import options
from halfbyte.cli.human import size
from halfbyte.cli.logs import prepare_logs
from halfbyte.cli.output import print_json, say, status, table

if TYPE_CHECKING:
    from halfbyte.demo import Demo

SUMMARY = "quantize a bundled model with six recipes, verify and compare the results, offline"
EXAMPLES = """\
  halfbyte demo
  halfbyte demo --keep ./demo-output --json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--keep", metavar="DIR", help="write the six checkpoints to this folder and keep them")
    options.add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Run the demo in a temporary folder, or where the user wants to keep it."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    prepare_logs(logging.ERROR)
    from halfbyte.checkpoint.scratch import scratch_folder
    from halfbyte.demo import run_demo

    place = nullcontext(args.keep) if args.keep else scratch_folder("halfbyte-demo")
    with place as folder:
        results = run_demo(Path(folder), args.threads, lambda label: status(label, args.json))
    if args.json:
        print_json(_document(results))
    else:
        _show(results)
        if args.keep:
            say(f"kept in {args.keep}")
    return 0


def _document(results: Demo) -> dict[str, Any]:
    source = {
        "bytes": results.source_bytes,
        "parameters": results.source_parameters,
        "bits_per_weight": results.source_bits_per_weight,
        "perplexity": results.source_perplexity,
    }
    rest = {"note": results.note, "protocol": results.protocol, "seconds": results.seconds}
    return {"source": source, "rows": results.rows, **rest}


def _show(results: Demo) -> None:
    rows = [
        [
            row.recipe,
            size(row.bytes),
            f"{row.bits_per_weight:.2f}",
            f"{row.relmse:.5f}",
            _number(row.perplexity, "{:.3f}"),
            _number(row.kl, "{:.5f}"),
            _number(row.top1, "{:.2%}"),
        ]
        for row in results.rows
    ]
    source = ["source (BF16)", size(results.source_bytes), f"{results.source_bits_per_weight:.2f}", "", "", "", ""]
    source[4] = _number(results.source_perplexity, "{:.3f}")
    columns = ["recipe", ">size", ">bits/weight", ">relMSE", ">perplexity", ">KL (nats)", ">same top-1"]
    shown = 4 if results.note else len(columns)
    table(columns[:shown], [row[:shown] for row in [source, *rows]])
    say(
        "",
        "Each result was verified against the source. relMSE: squared error of the quantized weights / sum of squares.",
        "These recipes quantize the large matrices; embeddings, lm_head, router, norms and the MTP head stay BF16.",
    )
    if results.protocol:
        p = results.protocol
        say(
            f"Perplexity and KL: {p['tokens']:,} held-out tokens in windows of {p['length']}, computed in {p['dtype']}."
        )
    if results.note:
        say(results.note)
    say(f"{results.seconds:.0f} s")


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else spec.format(value)
