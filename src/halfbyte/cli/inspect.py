"""``halfbyte inspect``: a checkpoint at a glance."""

from __future__ import annotations

import argparse

from halfbyte.cli import options
from halfbyte.cli.output import print_json, say, table
from halfbyte.cli.units import exact, size

SUMMARY = "show what a checkpoint holds, from its headers alone"
EXAMPLES = """\
  halfbyte inspect ./Qwen3.5-35B-A3B
  halfbyte inspect Qwen/Qwen3.5-35B-A3B --json
  halfbyte inspect --inventory tensors.json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare options."""
    options.add_source(parser)


def run(args: argparse.Namespace) -> int:
    """Print the overview."""
    from halfbyte.overview import overview

    found = overview(options.open_checkpoint(args))
    if args.json:
        print_json({**vars(found), "bits_per_weight": found.bits_per_weight})
        return 0
    revision = f" at {found.revision}" if found.revision else ""
    built = f" ({', '.join(found.architectures)})" if found.architectures else ""
    say(f"{found.source}{revision}", f"family      {found.family}{built}")
    if found.note:
        say(f"note        {found.note}")
    has = ", ".join(n for n, there in (("vision", found.vision), ("multi-token prediction", found.mtp)) if there)
    say(
        f"dialect     {found.dialect or 'none: nothing is quantized'}",
        f"also holds  {has or 'neither vision nor multi-token prediction'}",
        f"files       {len(found.files)} with weights, {len(found.side_files)} others ({size(found.side_file_bytes)})",
    )
    if found.ignored_files:
        say(f"ignored     {', '.join(found.ignored_files)}")
    say("")
    table(
        ("role", ">tensors", ">parameters", "stored as", ">bytes", ">bits"),
        [
            (
                role.role,
                f"{role.tensors:,}",
                f"{role.parameters:,}",
                ", ".join((*role.formats, *role.dtypes)),
                f"{role.nbytes:,}",
                f"{8 * role.nbytes / max(role.parameters, 1):.2f}",
            )
            for role in sorted(found.roles, key=lambda role: -role.nbytes)
        ],
        (
            "all",
            f"{found.tensors:,}",
            f"{found.parameters:,}",
            "",
            f"{found.data_bytes:,}",
            f"{found.bits_per_weight:.2f}",
        ),
    )
    say("", f"{exact(found.data_bytes)} of tensors")
    return 0
