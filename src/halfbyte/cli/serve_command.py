"""``halfbyte serve``: model servers, one for each precision, behind one door."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from halfbyte.cli.human import parse_size, positive
from halfbyte.cli.output import print_json, table

if TYPE_CHECKING:
    from halfbyte.serve.routing_rules import RoutingRules
    from halfbyte.serve.served_models import ServedModel

SUMMARY = "serve models over OpenAI's API, with several precisions behind one address"
EXAMPLES = """\
  halfbyte serve ./model-nvfp4
  halfbyte serve ./model-nvfp4 ./model --rules quantclaw --api-key-file key.txt
  halfbyte serve fast=./model-mxfp4 exact=./model --rules rules.yaml --explain prompts.jsonl
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "models",
        metavar="[NAME=]MODEL",
        nargs="+",
        help="checkpoint, and a name for it (default: its format)",
    )
    parser.add_argument("--name", metavar="N", default="", help="name for clients (default: the first folder)")
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "transformers", "llamacpp", "mlx"),
        default="auto",
        help="server to start (default: by dialect, then vllm, then transformers)",
    )
    parser.add_argument("--engine-python", metavar="PYTHON", default="", help="Python of the engine's own environment")
    parser.add_argument("--engine-args", metavar="ARGS", default="", help="arguments passed to the engine as they are")
    parser.add_argument("--rules", metavar="FILE", help="routing rules: a YAML file, or the built-in `quantclaw`")
    parser.add_argument("--router", action="store_true", help="put the router before a single model, too")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=positive, default=8080, help="default: 8080")
    parser.add_argument("--api-key-file", metavar="FILE", help="file with the key that clients must send")
    parser.add_argument("--max-body", metavar="SIZE", type=parse_size, help="largest request (default: 32MiB)")
    parser.add_argument("--max-concurrent", metavar="N", type=positive, default=64, help="default: 64")
    parser.add_argument("--max-queue", metavar="N", type=positive, default=256, help="default: 256; more get 429")
    parser.add_argument("--timeout", metavar="S", type=positive, default=600, help="seconds per answer (default: 600)")
    parser.add_argument("--log-prompts", action="store_true", help="write the text of requests to the log, too")
    parser.add_argument("--explain", metavar="FILE.jsonl", help="print decisions for requests; start nothing")


def run(args: argparse.Namespace) -> int:
    """Read the models and rules, then serve or explain."""
    from halfbyte.errors import HalfbyteError
    from halfbyte.serve.routing_rules import load_rules
    from halfbyte.serve.served_models import read_models

    rules = load_rules(args.rules) if args.rules else None
    models = read_models(args.models)
    if args.explain:
        if rules is None:
            raise HalfbyteError("--explain needs --rules")
        return _explain(args, rules, models)
    if args.json:
        raise HalfbyteError("--json goes with --explain; a running server is read at /status.json")
    return _serve(args, rules, models)


def _serve(args: argparse.Namespace, rules: RoutingRules | None, models: list[ServedModel]) -> int:
    from pathlib import Path

    from halfbyte.serve.api_key import read_key
    from halfbyte.serve.limits import Limits
    from halfbyte.serve.router import RouterOptions
    from halfbyte.serve.service import EngineOptions, needs_router, run_alone, run_router

    key = read_key(args.api_key_file) if args.api_key_file else None
    name = args.name or Path(args.models[0].partition("=")[2] or args.models[0]).resolve().name
    engines = EngineOptions(args.engine, args.engine_python, tuple(shlex.split(args.engine_args)))
    if not args.router and not needs_router(models, rules, engines, key):
        run_alone(models[0], engines, name, args.host, args.port, key)
    limits = Limits(
        body=args.max_body or Limits.body,
        seconds=float(args.timeout),
        concurrent=args.max_concurrent,
        queue=args.max_queue,
    )
    options = RouterOptions(name, args.host, key, limits, args.log_prompts)
    run_router(models, rules, engines, options, args.port)
    return 0


def _explain(args: argparse.Namespace, rules: RoutingRules, models: list[ServedModel]) -> int:
    from halfbyte.serve.decision import check_rules
    from halfbyte.serve.explain import explain

    precisions = [model.precision for model in models]
    check_rules(rules, precisions)
    document = explain(args.explain, rules, precisions)
    if args.json:
        print_json(document)
        return 0
    rows = [
        [str(number), d["precision"], d["rule"], f"{d['cost']:.2f}", "-" if d["kl"] is None else f"{d['kl']:.5f}"]
        for number, d in enumerate(document["decisions"], 1)
    ]
    table(["request", "precision", "rule", "cost", "KL"], rows)
    loss = "not measured" if document["mean_kl"] is None else f"{document['mean_kl']:.5f}"
    print(f"mean cost {document['mean_cost']:.2f} of the most bits served; mean KL {loss}")
    return 0
