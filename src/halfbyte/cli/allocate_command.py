"""``halfbyte allocate``: a recipe for a given size."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli import options
from halfbyte.cli.human import exact, parse_size, positive
from halfbyte.cli.logs import prepare_logs
from halfbyte.cli.output import print_json, say, steps, table, warn
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.source.checkpoint import Checkpoint

SUMMARY = "choose a format for every weight to meet a size with the smallest loss; writes a recipe"
EXAMPLES = """\
  halfbyte allocate ./Qwen3.5-35B-A3B --budget 21GiB -o my-recipe.yaml
  halfbyte allocate ./Qwen3.5-35B-A3B --budget 21GiB --text calibration.txt --dtype bfloat16 -o my-recipe.yaml
  halfbyte allocate ./model --bits 4.6 --sensitivity sensitivity.jsonl --importance statistics -o my-recipe.yaml
  halfbyte allocate ./model --budget 20GiB --formats nvfp4 fp8_channel keep --dialect compressed-tensors -o r.yaml

The effect of a weight's error is measured on a text (--text; the whole model is in memory, and an interrupted
run continues), read from a file (--sensitivity), or estimated from the weight's place in the model.
needs the solver HiGHS: pip install 'halfbyte[allocate]'; --text needs halfbyte[transformers] too
"""
SUFFIX = ".sensitivity.jsonl"
TOKENS = 8192


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    options.add_source(parser)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--budget", metavar="SIZE", type=parse_size, help="bytes of the whole output, such as 21GiB")
    size.add_argument("--bits", metavar="B", type=float, help="bits per weight, over all weights of the output")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the recipe (.yaml) to write")
    parser.add_argument(
        "--formats", metavar="F", nargs="+", help="candidate formats; `keep` leaves the weight unchanged"
    )
    parser.add_argument("--roles", metavar="R", nargs="+", default=["linear"], help="roles to decide (default linear)")
    parser.add_argument(
        "--importance", metavar="FILE", help="importance file; errors then approximate those of outputs"
    )
    options.add_calibration_of_base(parser)
    mattering = parser.add_mutually_exclusive_group()
    mattering.add_argument("--sensitivity", metavar="FILE", help="output of `halfbyte sensitivity`")
    mattering.add_argument(
        "--text",
        metavar="FILE",
        help="measure sensitivity on this UTF-8 text, and save it beside the recipe for other sizes",
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=positive, help=f"use only the first N tokens of the text (default {TOKENS})"
    )
    parser.add_argument("--length", metavar="N", type=positive, help="tokens in a window (default 512)")
    options.add_bos(parser)
    parser.add_argument("--device", metavar="D", help="torch device, such as cuda (default: cpu)")
    parser.add_argument("--dtype", metavar="T", help="torch dtype of the computation (default float32)")
    parser.add_argument("--dialect", metavar="D", default="halfbyte", help="dialect of the recipe (default halfbyte)")


def run(args: argparse.Namespace) -> int:
    """Allocate, write the recipe and say what it comes to."""
    from halfbyte.allocate import FORMATS, AllocateOptions, allocate_recipe
    from halfbyte.calibration import calibration_for
    from halfbyte.checkpoint import write_file_atomic
    from halfbyte.plan.dialect_choice import find_dialect

    out = Path(args.output)
    if out.suffix not in (".yaml", ".yml"):
        raise HalfbyteError(f"{out} should end in .yaml, as recipes do")
    checkpoint = options.open_checkpoint(args, runs_model=args.text is not None)
    dialect = find_dialect(args.dialect).for_model(checkpoint.inventory)
    known = calibration_for(args.importance, checkpoint, args.calibration_of_base) if args.importance else None
    if args.text is None and any((args.max_tokens, args.length, args.device, args.dtype)):
        raise HalfbyteError(
            "--max-tokens, --length, --device and --dtype describe the measurement; give --text as well"
        )
    formats = args.formats or FORMATS
    measured = args.sensitivity
    if args.text is not None:
        measured = partial(_measure, args, checkpoint, out.with_suffix(SUFFIX), formats)
    wanted = AllocateOptions(
        name=out.stem,
        budget=args.budget,
        bits=args.bits,
        formats=formats,
        roles=args.roles,
        calibration=known,
        sensitivity=measured,
    )
    with steps("errors", args.json) as report:
        allocated = allocate_recipe(checkpoint, dialect, wanted, report)
    write_file_atomic(out, allocated.recipe.encode())
    if args.json:
        print_json({"file": str(out), **allocated.to_dict()})
        return 0
    rows = []
    for fmt in dict.fromkeys(c.format for c in allocated.allocation.chosen):
        members = [(u, c) for u, c in zip(allocated.units, allocated.allocation.chosen, strict=True) if c.format == fmt]
        rows.append(
            (
                fmt,
                str(len(members)),
                f"{sum(u.parameters for u, _ in members):,}",
                exact(sum(c.bytes for _, c in members)),
                f"{sum(c.loss for _, c in members):.4g}",
            )
        )
    table(("format", ">units", ">parameters", ">bytes", ">predicted loss"), rows)
    plan = allocated.plan
    say("", f"{out}: {exact(plan.repository_bytes)}, {plan.bits_per_weight:.3f} bits per weight")
    if args.text is not None:
        say(f"sensitivities: {out.with_suffix(SUFFIX)}, which another size uses again")
    elif measured is None:
        say(
            "predicted from errors and each weight's place in the model, without running it; losses compare, and are "
            "no divergences. Better: measure which weights matter (--text FILE)"
        )
    return 0


def _measure(args: argparse.Namespace, checkpoint: Checkpoint, file: Path, formats: Sequence[str]) -> Path:
    """Sensitivities of all weights that are to be decided, each in the smallest of the formats."""
    prepare_logs()
    from halfbyte.allocate import smallest_recipe
    from halfbyte.evaluate import TextSettings, sensitivity
    from halfbyte.evaluate.cache_folder import default_cache

    source = options.model_to_run(args, checkpoint)
    settings = TextSettings(
        text=args.text,
        length=args.length,
        max_tokens=args.max_tokens or TOKENS,
        bos=args.bos,
        dtype=args.dtype or "float32",
        device=args.device,
        cache=default_cache(),
    )
    with steps("sensitivities", args.json) as report:
        sensitivity(
            source, smallest_recipe(checkpoint, formats, args.roles), file, settings, progress=report, announce=warn
        )
    return file
