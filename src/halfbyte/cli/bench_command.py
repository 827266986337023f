"""``halfbyte bench serve URL``: how fast a server answers under load."""

from __future__ import annotations

import argparse

from halfbyte.cli.human import positive
from halfbyte.cli.output import print_json, table

SUMMARY = "measure a model server: tokens/s, time to first token, time between tokens"
EXAMPLES = """\
  halfbyte bench serve http://127.0.0.1:8080
  halfbyte bench serve http://127.0.0.1:8080 --model demo@nvfp4 --concurrency 1 4 16 64 --json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("what", choices=("serve",), help="what is measured: an OpenAI-compatible server")
    parser.add_argument("url", metavar="URL", help="address of the server, without /v1")
    parser.add_argument("--model", metavar="N", default="", help="model to ask (default: the first one listed)")
    parser.add_argument(
        "--concurrency", metavar="N", type=positive, nargs="+", default=[1, 4, 16, 64], help="default: 1 4 16 64"
    )
    parser.add_argument("--max-tokens", metavar="N", type=positive, default=64, help="tokens per answer (default: 64)")
    parser.add_argument("--requests", metavar="N", type=positive, default=2, help="requests in a row (default: 2)")
    parser.add_argument("--api-key-file", metavar="FILE", help="file with the key of the server")


def run(args: argparse.Namespace) -> int:
    """Measure, then print a table or JSON."""
    import asyncio

    from halfbyte.serve.api_key import read_key
    from halfbyte.serve.load_test import LoadOptions, first_model, run_load

    key = read_key(args.api_key_file) if args.api_key_file else ""
    model = args.model or asyncio.run(first_model(args.url, key))
    options = LoadOptions(model, max_tokens=args.max_tokens, requests=args.requests, api_key=key)
    results = run_load(args.url, args.concurrency, options)
    if args.json:
        print_json({"url": args.url, "model": model, "max_tokens": args.max_tokens, "results": results})
        return 0
    columns = ["concurrent", ">tokens/s", ">first token ms", ">p95", ">between tokens ms", ">p95"]
    keys = ("first_token_median", "first_token_p95", "between_tokens_median", "between_tokens_p95")
    rows = [
        [str(r["concurrency"]), f"{r['tokens_per_second']:.1f}", *(_milliseconds(r[key]) for key in keys)]
        for r in results
    ]
    table(columns, rows)
    return 0


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"
