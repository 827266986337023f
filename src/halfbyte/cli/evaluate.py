"""``halfbyte evaluate``: perplexity, and how far quantized models are from their source."""

from __future__ import annotations

import argparse
from typing import Any

from halfbyte.cli.output import print_json, say, steps, table
from halfbyte.cli.quiet import prepare_logs
from halfbyte.cli.units import positive, size

SUMMARY = "measure perplexity on a text, and KL divergence and top-1 agreement with the source"
EXAMPLES = """\
  halfbyte evaluate ./out --against ./Qwen3.5-35B-A3B --text held-out.txt
  halfbyte evaluate ./nvfp4 ./mixfp4 --against ./model --text held-out.txt --length 2048 --stride 1024 --json

needs torch and transformers: pip install 'halfbyte[transformers]'
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare options."""
    parser.add_argument("paths", metavar="PATH", nargs="+", help="checkpoints to measure")
    parser.add_argument("--against", metavar="SOURCE", help="the original, for KL divergence and top-1 agreement")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (only the demo model brings its own)")
    parser.add_argument("--length", metavar="N", type=positive, default=512, help="tokens in a window (default 512)")
    parser.add_argument("--stride", metavar="N", type=positive, help="tokens between windows (default: the length)")
    parser.add_argument("--max-tokens", metavar="N", type=positive, help="use only the text's first N tokens")
    parser.add_argument("--device", metavar="D", help="where torch computes, such as cuda (default: cpu)")
    parser.add_argument("--dtype", metavar="T", default="float32", help="torch dtype to compute in (default float32)")
    parser.add_argument(
        "--dequantize", action="store_true", help="decode weights once, not in every pass: faster, larger"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print a row per checkpoint."""
    prepare_logs()
    from halfbyte.api import evaluate

    with steps("evaluating", args.json) as report:
        rows = evaluate(
            args.paths,
            args.against,
            args.text,
            length=args.length,
            stride=args.stride,
            max_tokens=args.max_tokens,
            device=args.device,
            dtype=args.dtype,
            dequantize=args.dequantize,
            progress=report,
        )
    if args.json:
        print_json({"rows": rows})
        return 0
    table(
        (
            "checkpoint",
            ">size",
            ">bits/weight",
            ">perplexity",
            ">KL mean",
            ">median",
            ">p90",
            ">p99",
            ">same top-1",
        ),
        [_cells(row) for row in rows],
    )
    protocol = rows[0]["protocol"]
    say(
        "",
        f"{protocol['text']}: {protocol['tokens']:,} tokens scored in {protocol['windows']:,} windows of "
        f"{protocol['length']}, stride {protocol['stride']}, {protocol['dtype']}; KL in nats per token",
    )
    return 0


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    first = (row["name"], size(row["bytes"]), f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.4f}")
    kl = row["kl"]
    if kl is None:
        return (*first, "", "", "", "", "")
    return (*first, *(f"{kl[key]:.5f}" for key in ("mean", "median", "p90", "p99")), f"{kl['top1']:.2%}")
