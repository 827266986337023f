"""What charts draw: studies as tidy rows, with text only where a chart shows it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from halfbyte.report.results_schema import Allocation, Errors, Row, Sensitivity, WeightError
from halfbyte.report.studies import Study

Records = list[dict[str, Any]]
CLOSE = 0.005
"""Sizes that differ by no more are the same: a scale per channel or tensor decides nothing."""
OUTSIDE = "–"
"""Stands for the layer of weights that are in none."""


def sizes(study: Study) -> Records:
    """A checkpoint's bytes and divergence; ``frontier``: no other one of about that size is nearer to the source."""
    records: Records = [
        {
            "checkpoint": row.label,
            "bytes": row.bytes,
            "bits": row.bits_per_weight,
            "kl": row.kl.mean,
            "low": row.kl_ci.mean[0] if row.kl_ci and row.kl_ci.mean else None,
            "high": row.kl_ci.mean[1] if row.kl_ci and row.kl_ci.mean else None,
            "top1": row.kl.top1,
        }
        for row in study.quantized
        if row.bytes and row.kl is not None and row.kl.mean > 0
    ]
    for record in records:
        rivals = (r["kl"] for r in records if r is not record and r["bytes"] <= record["bytes"] * (1 + CLOSE))
        record["frontier"] = record["kl"] < min(rivals, default=float("inf"))
    return records


def percentiles(study: Study) -> Records:
    """Statistics of the divergence per token, long; none where one of them is zero, which a log scale cannot show."""
    statistics = (("median", "median"), ("mean", "mean"), ("p90", "90th percentile"), ("p99", "99th percentile"))
    return [
        {"checkpoint": row.label, "statistic": label, "kl": getattr(row.kl, key), "order": row.kl.mean}
        for row in study.quantized
        if row.kl is not None and min(row.kl.median, row.kl.mean) > 0
        for key, label in statistics
    ]


def with_errors(study: Study) -> list[Row]:
    """Checkpoints whose weights were compared one by one."""
    return [row for row in study.quantized if row.errors and row.errors.weights]


def weights(study: Study) -> Records:
    """relMSE by checkpoint, role and layer; where a role has several weights in a layer, their mean by parameters."""
    return [
        {
            "checkpoint": row.label,
            "role": role,
            "layer": layer,
            "formats": ", ".join(dict.fromkeys(e.format for e in members)),
            "weights": len(members),
            "relmse": relmse,
            "weighted": _mean((e.calibrated_relmse, e.parameters) for e in members),
        }
        for row in with_errors(study)
        if row.errors
        for (role, layer), members in _cells(row.errors.weights).items()
        if (relmse := _mean((e.relmse, e.parameters) for e in members))
    ]


def tables(study: Study) -> Records:
    """Share of the blocks that chose each table, by checkpoint, role and layer."""
    return [
        {"checkpoint": row.label, "role": role, "layer": layer, "table": table, "share": share}
        for row in with_errors(study)
        if row.errors
        for (role, layer), members in _cells(e for e in row.errors.weights if len(e.tables) > 1).items()
        for table in dict.fromkeys(name for e in members for name in e.tables)
        if (share := _mean((e.tables.get(table), e.parameters) for e in members)) is not None
    ]


def scales(study: Study) -> Records:
    """Share of blocks by stored scale, over all weights of a checkpoint that have the same format."""
    records: Records = []
    for row in study.quantized:
        if row.errors is None:
            continue
        for fmt, counts in _histograms(row.errors).items():
            total = sum(counts.values())
            values = sorted(value for value in counts if value > 0)
            for at, value in enumerate(values):
                # a bar reaches to the next scale, the last one as far as the one before; at most an octave
                before = value / values[at - 1] if at else 2.0
                end = min(values[at + 1] if at + 1 < len(values) else value * before, 2 * value)
                record = {"checkpoint": row.label, "format": fmt, "scale": value, "end": end}
                records.append(record | {"share": counts[value] / total, "zero": counts.get(0.0, 0) / total})
    return records


def sensitivity(document: Sensitivity) -> Records:
    """Divergence by group, the worst first; the whole recipe has the group ``all``."""
    ordered = [g for g in sorted(document.groups, key=lambda g: -g.kl.mean) if g.group != "all"]
    # what all names begin with says nothing
    parts = [g.group.split(".")[:-1] for g in ordered]
    shared = [step[0] for step in takewhile(lambda step: len(set(step)) == 1, zip(*parts, strict=False))]
    prefix = "".join(f"{part}." for part in shared)
    return [
        {
            "group": g.group.removeprefix(prefix).removesuffix(".weight"),
            "name": g.group,
            "roles": ", ".join(g.roles),
            "format": g.format,
            "kl": g.kl.mean,
            "saved": g.source_bytes - g.bytes,
            "relmse": g.relmse,
        }
        for g in ordered
    ]


def frontier(document: Allocation) -> Records:
    """Predicted loss by bytes; ``chosen`` is the recipe that was written."""
    points = [{"bytes": p.data_bytes, "loss": p.loss, "chosen": False} for p in document.frontier if p.loss > 0]
    return [*points, {"bytes": document.data_bytes, "loss": document.predicted_loss, "chosen": True}]


def _cells(errors: Iterable[WeightError]) -> dict[tuple[str, str], list[WeightError]]:
    cells: dict[tuple[str, str], list[WeightError]] = {}
    for error in errors:
        cells.setdefault((error.role, OUTSIDE if error.layer is None else str(error.layer)), []).append(error)
    return cells


def _mean(pairs: Iterable[tuple[float | None, int]]) -> float | None:
    """Weighted mean of what is known."""
    known = [(value, weight) for value, weight in pairs if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def _histograms(errors: Errors) -> dict[str, dict[float, int]]:
    histograms: dict[str, dict[float, int]] = {}
    for entry in errors.classes or errors.weights:
        if entry.scales is not None:
            counts = histograms.setdefault(f"{entry.format}, scales {entry.scales.type.upper()}", {})
            for value, count in zip(entry.scales.values, entry.scales.counts, strict=True):
                counts[value] = counts.get(value, 0) + count
    return histograms
