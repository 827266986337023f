"""Errors of quantized weights, gathered by role: what quantize and verify report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from halfbyte.cli.output import table

WEIGHTED = "weighted by activations"
"""Heading of the relative error of outputs on the calibration text."""

if TYPE_CHECKING:
    from halfbyte.kernels.tensor_error import TensorError


def by_role(errors: Iterable[TensorError]) -> list[dict[str, Any]]:
    """Gather errors by role and format: weights, parameters, relmse, the largest error, blocks by codebook.

    ``calibrated_relmse`` is the error that a calibrated conversion makes small, None without a calibration.
    """
    from halfbyte.formats import get_format
    from halfbyte.kernels.tensor_error import calibrated_relmse

    groups: dict[tuple[str, str], list[TensorError]] = {}
    for error in errors:
        groups.setdefault((error.role, error.format), []).append(error)
    rows = []
    for (role, fmt), members in groups.items():
        squares = sum(e.squares for e in members)
        # what is carried over with other global scales counts no blocks
        counts = [sum(column) for column in zip_longest(*(e.codebook_blocks for e in members), fillvalue=0)]
        known = get_format(fmt)
        tables = [t.name for t in known.codebooks]
        rows.append(
            {
                "role": role,
                "format": fmt,
                "weights": len(members),
                "parameters": sum(e.elements for e in members),
                "relmse": sum(e.squared_error for e in members) / squares if squares else 0.0,
                "calibrated_relmse": calibrated_relmse(members),
                "max_error": max(e.max_error for e in members),
                "codebook_blocks": dict(zip(tables, counts, strict=False)),
            }
        )
    return rows


def show(errors: Sequence[TensorError], relmse: float) -> None:
    """Print the same as a table, with what activations weigh last: GPTQ lowers that and raises the plain error."""
    from halfbyte.kernels.tensor_error import calibrated_relmse

    rows = by_role(errors)
    calibrated = calibrated_relmse(errors)
    mixed = any(row["codebook_blocks"] for row in rows)
    columns = ["role", "format", ">weights", ">parameters", ">relative error", ">largest error"]
    lines = [
        [
            row["role"],
            row["format"],
            f"{row['weights']:,}",
            f"{row['parameters']:,}",
            f"{row['relmse']:.5f}",
            f"{row['max_error']:.4g}",
        ]
        for row in rows
    ]
    total = ["all", "", f"{sum(r['weights'] for r in rows):,}", f"{sum(r['parameters'] for r in rows):,}"]
    total += [f"{relmse:.5f}", f"{max((r['max_error'] for r in rows), default=0):.4g}"]
    if calibrated is not None:
        columns.append(f">{WEIGHTED}")
        for line, row in zip(lines, rows, strict=True):
            line.append(_number(row["calibrated_relmse"]))
        total.append(_number(calibrated))
    if mixed:
        columns.append("blocks by codebook")
        for line, row in zip(lines, rows, strict=True):
            line.append(_shares(row["codebook_blocks"]))
        total.append("")
    table(columns, lines, total)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _shares(blocks: dict[str, int]) -> str:
    """``45% e2m1``; of two tables the first says it all."""
    every = max(sum(blocks.values()), 1)
    shares = [f"{100 * count / every:.0f}% {name}" for name, count in blocks.items()]
    return ", ".join(shares[:1] if len(shares) == 2 else shares)
