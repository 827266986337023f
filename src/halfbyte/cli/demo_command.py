"""``halfbyte demo``: the bundled model in six recipes, verified and compared, offline."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
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
    """Declare options."""
    parser.add_argument("--keep", metavar="DIR", help="write the six checkpoints to this folder and keep them")
    options.add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Run the demo in a temporary folder, or where the user wants to keep it."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    prepare_logs(logging.ERROR)
    from halfbyte.demo import run_demo

    place = nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory(prefix="halfbyte-demo-")
    with place as folder:
        found = run_demo(Path(folder), args.threads, lambda label: status(label, args.json))
    if args.json:
        print_json(_document(found))
    else:
        _show(found)
        if args.keep:
            say(f"kept in {args.keep}")
    return 0


def _document(found: Demo) -> dict[str, Any]:
    source = {
        "bytes": found.source_bytes,
        "parameters": found.source_parameters,
        "bits_per_weight": found.source_bits_per_weight,
        "perplexity": found.source_perplexity,
    }
    rest = {"note": found.note, "protocol": found.protocol, "seconds": found.seconds}
    return {"source": source, "rows": found.rows, **rest}


def _show(found: Demo) -> None:
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
        for row in found.rows
    ]
    source = ["source (BF16)", size(found.source_bytes), f"{found.source_bits_per_weight:.2f}", "", "", "", ""]
    source[4] = _number(found.source_perplexity, "{:.3f}")
    columns = ["recipe", ">size", ">bits/weight", ">relMSE", ">perplexity", ">KL (nats)", ">same top-1"]
    shown = 4 if found.note else len(columns)
    table(columns[:shown], [row[:shown] for row in [source, *rows]])
    say(
        "",
        "Each result was verified against the source. relMSE: squared error of the quantized weights / sum of squares.",
        "These recipes quantize the large matrices; embeddings, lm_head, router, norms and the MTP head stay BF16.",
    )
    if found.protocol:
        p = found.protocol
        say(
            f"Perplexity and KL: {p['tokens']:,} held-out tokens in windows of {p['length']}, computed in {p['dtype']}."
        )
    if found.note:
        say(found.note)
    say(f"{found.seconds:.0f} s")


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else spec.format(value)
