"""``halfbyte allocate``: a recipe for a given size."""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.cli import options
from halfbyte.cli.output import print_json, say, steps, table
from halfbyte.cli.units import exact, parse_size
from halfbyte.errors import HalfbyteError

SUMMARY = "choose a format for every weight, so that a size is met with the least loss; writes a recipe"
EXAMPLES = """\
  halfbyte allocate ./Qwen3.5-35B-A3B --budget 21GiB -o my-recipe.yaml
  halfbyte allocate ./model --bits 4.6 --sensitivity sensitivity.jsonl --importance statistics -o my-recipe.yaml
  halfbyte allocate ./model --budget 20GiB --formats nvfp4 fp8_channel keep --dialect compressed-tensors -o r.yaml

needs the solver HiGHS: pip install 'halfbyte[allocate]'
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare options."""
    options.add_source(parser)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--budget", metavar="SIZE", type=parse_size, help="bytes of the whole output, such as 21GiB")
    size.add_argument("--bits", metavar="B", type=float, help="bits per weight, over all weights of the output")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the recipe (.yaml) to write")
    parser.add_argument("--formats", metavar="F", nargs="+", help="formats to choose from; `keep` leaves as it is")
    parser.add_argument("--roles", metavar="R", nargs="+", default=["linear"], help="roles to decide (default linear)")
    parser.add_argument("--importance", metavar="FILE", help="importance of columns: errors become those of outputs")
    parser.add_argument("--sensitivity", metavar="FILE", help="what `halfbyte sensitivity` measured")
    parser.add_argument("--dialect", metavar="D", default="halfbyte", help="what the recipe is for (default halfbyte)")


def run(args: argparse.Namespace) -> int:
    """Allocate, write the recipe and say what it comes to."""
    from halfbyte.allocate import FORMATS, allocate_recipe
    from halfbyte.calibrate import calibration_of
    from halfbyte.checkpoint import write_file_atomic
    from halfbyte.dialects import get_dialect

    out = Path(args.output)
    if out.suffix not in (".yaml", ".yml"):
        raise HalfbyteError(f"{out} should end in .yaml, as recipes do")
    checkpoint = options.open_checkpoint(args)
    dialect = get_dialect(args.dialect).for_model(checkpoint.inventory)
    known = calibration_of(args.importance, checkpoint.weights) if args.importance else None
    with steps("measuring", args.json) as report:
        found = allocate_recipe(
            checkpoint,
            dialect,
            out.stem,
            budget=args.budget,
            bits=args.bits,
            formats=args.formats or FORMATS,
            roles=args.roles,
            calibration=known,
            sensitivity=args.sensitivity,
            progress=report,
        )
    write_file_atomic(out, found.recipe.encode())
    if args.json:
        print_json({"file": str(out), **found.to_dict()})
        return 0
    rows = []
    for fmt in dict.fromkeys(c.format for c in found.allocation.chosen):
        own = [(u, c) for u, c in zip(found.units, found.allocation.chosen, strict=True) if c.format == fmt]
        rows.append(
            (fmt, str(len(own)), f"{sum(u.parameters for u, _ in own):,}", exact(sum(c.bytes for _, c in own)),
             f"{sum(c.loss for _, c in own):.4g}")
        )  # fmt: skip
    table(("format", ">units", ">parameters", ">bytes", ">predicted loss"), rows)
    plan = found.plan
    say("", f"{out}: {exact(plan.repository_bytes)}, {plan.bits_per_weight:.3f} bits per weight")
    if not args.sensitivity:
        say("predicted from errors alone, as if all weights mattered alike; measure which do: `halfbyte sensitivity`")
    return 0
