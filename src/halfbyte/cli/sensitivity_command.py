"""``halfbyte sensitivity``: which weights hurt when they are quantized."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from halfbyte.cli import options
from halfbyte.cli.human import positive, size
from halfbyte.cli.logs import prepare_logs
from halfbyte.cli.output import print_json, say, steps, table, warn

SUMMARY = "measure the KL divergence that each group of weights causes when only that group is quantized"
EXAMPLES = """\
  halfbyte sensitivity ./Qwen3.5-35B-A3B --recipe nvfp4 --text held-out.txt
  halfbyte sensitivity ./model --recipe mxfp4 --text held-out.txt --by role -o sensitivity.jsonl

Run the same command again to continue an interrupted run.
needs torch and transformers: pip install 'halfbyte[transformers]'
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("source", metavar="SRC", help="the source checkpoint")
    parser.add_argument(
        "--recipe", metavar="NAME_OR_FILE", required=True, help="a name that `halfbyte recipes` lists, or a YAML file"
    )
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (only the demo model includes one)")
    parser.add_argument(
        "--by",
        choices=("group", "role", "weight"),
        default="group",
        help="group (default): weights that engines fuse, all experts of a layer; role: each role of a layer; weight",
    )
    parser.add_argument("--protocol", choices=("wikitext2", "chunks-512"), help="as in `halfbyte evaluate`")
    parser.add_argument("--length", metavar="N", type=positive, help="tokens in a window (default 512)")
    parser.add_argument("--stride", metavar="N", type=positive, help="tokens between windows (default: the length)")
    parser.add_argument("--max-tokens", metavar="N", type=positive, help="use only the first N tokens of the text")
    options.add_bos(parser)
    parser.add_argument("--device", metavar="D", help="torch device, such as cuda (default: cpu)")
    parser.add_argument(
        "--dtype", metavar="T", default="float32", help="torch dtype of the computation (default float32)"
    )
    parser.add_argument("--cache", metavar="DIR", help="folder for the source's log-probabilities")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="JSON lines (default: SRC-RECIPE.sensitivity.jsonl in the current folder)",
    )
    parser.set_defaults(resume="; the same command continues where it stopped")


def run(args: argparse.Namespace) -> int:
    """Measure and print the groups, the worst first."""
    prepare_logs()
    from halfbyte.evaluate import TextSettings, sensitivity
    from halfbyte.evaluate.cache_folder import default_cache
    from halfbyte.recipes import load_recipe

    recipe = load_recipe(args.recipe)
    out = args.output or f"{Path(args.source).resolve().name}-{recipe.name}.sensitivity.jsonl"
    settings = TextSettings(**options.text_settings(args), cache=args.cache or default_cache())
    with steps("measuring", args.json) as report:
        document = sensitivity(args.source, recipe, out, settings, by=args.by, progress=report, announce=warn)
    if args.json:
        print_json(document)
    else:
        _show(document, out)
    return 0


def _show(document: dict[str, Any], out: str) -> None:
    *groups, whole = document["groups"]
    columns = [
        "group",
        "format",
        ">parameters",
        ">size",
        ">relMSE",
        ">KL mean",
        ">p99",
        ">same top-1",
        ">KL per saved MB",
    ]
    table(columns, [_cells(g) for g in sorted(groups, key=lambda g: -g["kl"]["mean"])], _cells(whole))
    together = sum(group["kl"]["mean"] for group in groups)
    say(
        "",
        f"KL in nats per token; the groups' sum is {together:.5f}, all together cause {whole['kl']['mean']:.5f}",
        f"written to {out}",
        document["protocol"]["note"],
    )


def _cells(group: dict[str, Any]) -> list[str]:
    kl, saved = group["kl"], (group["source_bytes"] - group["bytes"]) / 1e6
    return [
        group["group"],
        group["format"],
        f"{group['parameters']:,}",
        size(group["bytes"]),
        f"{group['relmse']:.5f}",
        f"{kl['mean']:.6f}",
        f"{kl['p99']:.5f}",
        f"{kl['top1']:.2%}",
        f"{kl['mean'] / saved:.2e}" if saved > 0 else "",
    ]
