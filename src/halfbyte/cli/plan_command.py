"""``halfbyte plan``: what a conversion would do, exactly, without reading a weight."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from halfbyte.cli import options
from halfbyte.cli.human import exact
from halfbyte.cli.output import print_json, say, table

if TYPE_CHECKING:
    from halfbyte.plan.conversion_plan import Plan

NO_RULE = "no rule of the recipe selects it"
SUMMARY = "show what a recipe does to a checkpoint, and the exact size of the result, without reading a weight"
EXAMPLES = """\
  halfbyte plan ./Qwen3.5-35B-A3B --recipe mixfp4
  halfbyte plan Qwen/Qwen3.5-35B-A3B --recipe nvfp4-fp8 --dialect compressed-tensors
  halfbyte plan ./Qwen3.5-35B-A3B --recipe ud-mxfp4 --importance imatrix.gguf
  halfbyte plan --inventory tensors.json --recipe my-recipe.yaml --json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    options.add_source(parser)
    options.add_recipe(parser)
    options.add_resources(parser)
    parser.add_argument(
        "--tensors", action="store_true", help="with --json: also the action and position of every tensor"
    )


def run(args: argparse.Namespace) -> int:
    """Make the plan and print it."""
    made = options.plan_of(args)
    if args.json:
        print_json({**document(made, args), **(made.to_dict() if args.tensors else {})})
    else:
        show(made, args)
    return 0


def document(made: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """A plan as one JSON object."""
    resources = made.resources(options.limits(args))
    return {
        "source": made.checkpoint.inventory.source,
        "recipe": made.recipe.name,
        "dialect": made.dialect.name,
        "fingerprint": made.fingerprint,
        "shards": [{"name": shard.name, "bytes": shard.layout.total} for shard in made.shards],
        "memory_bytes": resources.memory,
        "threads": resources.threads,
        **made.summary(),
    }


def show(made: Plan, args: argparse.Namespace) -> None:
    """Print a plan: a line per class of weights, the totals, what is worth knowing."""
    summary, resources = made.summary(), made.resources(options.limits(args))
    source = made.checkpoint.inventory
    say(f"{source.source}: recipe {made.recipe.name}, dialect {made.dialect.name}", "")
    table(
        ("role", "becomes", ">tensors", ">parameters", ">bits", ">bytes", "~why"),
        [_row(entry, made.recipe.name) for entry in summary["classes"]],
        (
            "all",
            "",
            _arrow(sum(c["tensors"] for c in summary["classes"]), summary["tensors"]),
            f"{summary['parameters']:,}",
            f"{summary['bits_per_weight']:.3f}",
            f"{summary['data_bytes']:,}",
            "",
        ),
    )
    parts = {key: summary[f"{key}_bytes"] for key in ("data", "header", "index", "fold", "side_file")}
    written = summary["repository_bytes"] - sum(parts.values())
    say(
        "",
        f"tensors     {exact(parts['data'])}, from {exact(source.total_bytes)} in the source",
        f"headers     {exact(parts['header'])} in {len(made.shards)} weight file(s)",
        *([f"index       {exact(parts['index'])}"] if parts["index"] else []),
        f"config      {exact(written)} in {', '.join([*made.config_files, *made.extra_files])}",
        *([f"scales      {exact(parts['fold'])} of AWQ smoothing, for verify"] if parts["fold"] else []),
        *([] if made.dialect.package.standalone else [f"side files  {exact(parts['side_file'])}, copied unchanged"]),
        f"repository  {exact(summary['repository_bytes'])} in all",
        f"memory      {exact(resources.memory)} at most while quantizing, with {resources.threads} thread(s)",
    )
    for note in summary["notes"]:
        say(f"note        {note}")


def _row(entry: dict[str, Any], recipe: str) -> tuple[str, ...]:
    # two reasons are so frequent that they are shown in few words
    why = {NO_RULE: "no rule"}.get(entry["reason"], entry["reason"] or "").removesuffix(f" of {recipe}")
    drops = entry["action"] == "drop"
    return (
        entry["role"],
        "dropped" if drops else f"kept {entry['format']}" if entry["action"] == "keep" else entry["format"],
        _arrow(entry["tensors"], entry["output_tensors"]),
        f"{entry['parameters']:,}",
        "" if drops else f"{entry['bits_per_weight']:.3f}",
        f"{entry['bytes']:,}",
        why,
    )


def _arrow(source: int, output: int) -> str:
    """Source tensors and what they become, where the number changes."""
    return f"{source:,}" if source == output else f"{source:,} -> {output:,}"
