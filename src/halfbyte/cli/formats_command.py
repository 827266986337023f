"""``halfbyte formats``: the number formats, and which dialects can spell them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from halfbyte.cli.output import print_json, say, table

if TYPE_CHECKING:
    from halfbyte.formats import Format

SUMMARY = "list the number formats, the dialects that support them, and the scale searches"
EXAMPLES = """\
  halfbyte formats
  halfbyte formats --json
"""
_SHAPE = (4096, 4096)


def arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(args: argparse.Namespace) -> int:
    """Print formats, dialects and searches."""
    from halfbyte.dialects import list_dialects
    from halfbyte.formats import get_format, list_formats
    from halfbyte.search import SEARCHES

    formats = [_about(get_format(name)) for name in list_formats()]
    if args.json:
        print_json(
            {
                "formats": formats,
                "dialects": [{"name": d.name, "about": d.about} for d in list_dialects()],
                "searches": [{"name": s.name, "about": s.description} for s in SEARCHES.values()],
            }
        )
        return 0
    table(
        ("format", ">bits", "block", "scales", "~codebooks", "~dialects"),
        [
            (
                f["name"],
                f"{f['bits_per_weight']:.4g}",
                f["block"],
                f["scale"] + (" + global" if f["global_scale"] else ""),
                ", ".join(f["tables"]),
                ", ".join(f["dialects"]),
            )
            for f in formats
        ],
    )
    say("")
    table(("dialect", "~for"), [(d.name, d.about) for d in list_dialects()])
    say("")
    table(("search", "~candidates"), [(s.name, s.description) for s in SEARCHES.values()])
    return 0


def _about(fmt: Format) -> dict[str, Any]:
    from halfbyte.dialects import list_dialects
    from halfbyte.models import Weight
    from halfbyte.models.weight import Piece

    name, stack = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.experts.down_proj"
    samples = [
        Weight(name, "mlp.down", 0, _SHAPE, "BF16", (Piece(name),)),
        Weight(stack, "experts.down", 0, (2, *_SHAPE), "BF16", (Piece(stack),)),
    ]
    rows, columns = (("all" if n < 0 else str(n)) for n in fmt.block)
    return {
        "name": fmt.name,
        "bits_per_weight": 8 * fmt.nbytes(_SHAPE) / (_SHAPE[0] * _SHAPE[1]),
        "block": f"{rows} x {columns}",
        "tables": [t.name for t in fmt.codebooks],
        "scale": fmt.scale.name if fmt.scale else "",
        "global_scale": fmt.has_global_scale,
        "dialects": [
            d.name for d in list_dialects() if any(d.spelling.problem(weight, fmt) is None for weight in samples)
        ],
    }
