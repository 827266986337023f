"""``halfbyte calibrate``: what the matrices of a model see while text goes through it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from halfbyte.cli.human import parse_size, positive, size
from halfbyte.cli.logs import prepare_logs
from halfbyte.cli.options import add_bos
from halfbyte.cli.output import print_json, say, steps, warn
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.calibration.statistics import Statistics
    from halfbyte.recipes import Recipe
    from halfbyte.source.checkpoint import Checkpoint

SUMMARY = "run text through a model, layer by layer, and save statistics of its matrices' inputs"
EXAMPLES = """\
  halfbyte calibrate ./Qwen3.5-35B-A3B ./statistics --text calibration.txt
  halfbyte calibrate ./model ./statistics --text chat.json --samples 256 --length 2048 --all-experts
  halfbyte calibrate ./a ./b ./c --merge ./statistics      statistics of one model over different texts
  halfbyte calibrate ./model ./statistics --imatrix imatrix.gguf      importance for llama.cpp's llama-quantize

Only one decoder layer is in memory at a time. Run the same command again to continue an interrupted run.
needs torch and transformers: pip install 'halfbyte[transformers]'
"""
_SHOWN = ("source", "texts", "samples", "length", "tokens", "all_experts")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("paths", metavar="PATH", nargs="+", help="MODEL OUT; with --merge, folders of statistics")
    parser.add_argument("--merge", metavar="OUT", help="add up statistics of one model over different texts")
    parser.add_argument("--text", metavar="FILE", nargs="+", help="UTF-8 text, or .json conversations in ShareGPT form")
    parser.add_argument(
        "--imatrix",
        metavar="FILE",
        help="also write the importance under llama.cpp's names: imatrix.gguf, or imatrix.dat in the older layout",
    )
    parser.add_argument("--samples", metavar="N", type=positive, default=128, help="samples of the text (default 128)")
    parser.add_argument("--length", metavar="L", type=positive, default=512, help="tokens per sample (default 512)")
    parser.add_argument(
        "--no-hessians", action="store_true", help="collect only importance and maxima, no products xᵀx"
    )
    parser.add_argument(
        "--output-hessians",
        action="store_true",
        help="also sum up gradients at the outputs, for `output: fisher`: a second pass, back from the head",
    )
    parser.add_argument(
        "--hessian-memory",
        metavar="SIZE",
        type=parse_size,
        default=2 << 30,
        help="limit for the Hessians of a stack of experts; a larger stack shares one (default 2GiB)",
    )
    parser.add_argument("--all-experts", action="store_true", help="show every token to every expert (slower)")
    add_bos(parser)
    parser.add_argument("--device", metavar="D", default="cpu", help="torch device, such as cuda (default cpu)")
    parser.add_argument(
        "--dtype", metavar="T", default="float32", help="torch dtype of the computation (default float32)"
    )


def run(args: argparse.Namespace) -> int:
    """Collect or merge, and say what there is."""
    if args.merge:
        if args.imatrix:
            raise HalfbyteError(
                "--imatrix needs the model; merge first, then: calibrate MODEL STATISTICS --imatrix FILE"
            )
        from halfbyte.calibration.statistics import Statistics, merge

        merge(args.paths, args.merge)
        statistics = Statistics(args.merge)
    else:
        statistics = _collect(args)
    facts = describe(statistics)
    if args.imatrix:
        facts["imatrix"] = {"file": args.imatrix, "entries": _export(args, statistics)}
    if args.json:
        print_json(facts)
        return 0
    say(
        f"{facts['weights']} weights, {facts['tokens']:,} tokens in {facts['samples']} samples, "
        f"{size(facts['bytes'])} in {facts['folder']}"
    )
    if args.imatrix:
        say(f"{args.imatrix}: {facts['imatrix']['entries']} entries under llama.cpp's names")
    for name, starved in facts["no_data"].items():
        say(f"no token reached {len(starved)} experts of {name}: {', '.join(map(str, starved[:16]))}")
    return 0


def _export(args: argparse.Namespace, statistics: Statistics) -> int:
    """Write the importance for llama.cpp; how many entries there are."""
    from halfbyte.calibration.imatrix import write_dat, write_gguf
    from halfbyte.calibration.importance import match_importance, spelled_for_llama
    from halfbyte.source.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(args.paths[0])
    match_importance(statistics.importance(), checkpoint.weights)  # sizes of another model are refused
    spelled = spelled_for_llama(statistics.importance(), checkpoint.weights, checkpoint.inventory.config)
    (write_dat if args.imatrix.endswith(".dat") else write_gguf)(spelled, args.imatrix)
    return len(spelled.values)


def _collect(args: argparse.Namespace) -> Statistics:
    if len(args.paths) == 2 and args.imatrix and not args.text:
        from halfbyte.calibration.statistics import Statistics

        return Statistics(args.paths[1])
    if len(args.paths) != 2 or not args.text:
        raise HalfbyteError("calibration needs a model, an output folder and a text: MODEL OUT --text FILE")
    return collect(
        args.paths[0],
        args.paths[1],
        args.text,
        args.json,
        samples=args.samples,
        length=args.length,
        hessians=not args.no_hessians,
        all_experts=args.all_experts,
        output_hessians=args.output_hessians,
        hessian_bytes=args.hessian_memory,
        bos=args.bos,
        dtype=args.dtype,
        device=args.device,
    )


def collect(source: str, out: str, texts: list[str], silent: bool, **options: Any) -> Statistics:
    """Collect statistics under a progress bar; ``options`` are fields of ``CollectOptions``."""
    prepare_logs()
    from halfbyte.runtime import need_torch

    need_torch()
    from halfbyte.calibrate.collect import CollectOptions, collect_statistics

    with steps("calibrating", silent) as report:
        return collect_statistics(source, out, texts, CollectOptions(**options), report, warn)


def round_layers(
    checkpoint: Checkpoint,
    recipe: Recipe,
    dialect: str | None,
    folder: str,
    texts: list[str],
    silent: bool,
    **options: Any,
) -> Statistics:
    """Calibrate and round weights layer by layer under a progress bar; ``options`` as of ``collect``."""
    prepare_logs()
    from halfbyte.runtime import need_torch

    need_torch()
    from halfbyte.calibrate.collect import CollectOptions
    from halfbyte.calibrate.residual import round_layers as run_layers
    from halfbyte.plan.build import plan_to_round

    plan = plan_to_round(checkpoint, recipe, dialect)
    with steps("calibrating and rounding", silent) as report:
        return run_layers(plan, recipe, folder, texts, CollectOptions(**options), report, warn)


def describe(statistics: Statistics) -> dict[str, Any]:
    """What statistics hold, for JSON: tokens, and how many reached each expert."""
    experts: dict[str, list[int]] = {}
    for name in statistics.names:
        counts = statistics.array(name, "routed")
        counts = statistics.array(name, "count") if counts is None else counts
        if counts is not None and counts.ndim:
            experts[name] = counts.tolist()
    return {
        "folder": str(statistics.folder),
        "weights": len(statistics.names),
        "bytes": sum(path.stat().st_size for path in statistics.folder.iterdir() if path.is_file()),
        **{key: statistics.description[key] for key in _SHOWN},
        "bos": bool(statistics.description.get("bos")),
        "tokens_per_expert": experts,
        "no_data": {
            name: [e for e, n in enumerate(counts) if not n]
            for name, counts in experts.items()
            if not all(counts) and not statistics.description["all_experts"]
        },
    }
