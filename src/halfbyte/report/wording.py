"""Numbers as words, the same in the report and in model cards."""

from __future__ import annotations

import math
from collections.abc import Sequence

from halfbyte.report.results_schema import Interval, Row

TASK_NAMES = {"mmlu_pro": "MMLU-Pro"}


def size(count: float) -> str:
    """``4.10 GB``: decimal units, three digits, zeros too, so that columns line up."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{f'{count:#.3g}'.rstrip('.')} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def task_name(name: str) -> str:
    """As its authors write it."""
    return TASK_NAMES.get(name, name)


def nats(value: float) -> str:
    """A divergence: five decimals, or three digits where that says more."""
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.5f}" if value else "0"
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}" if abs(value) >= 1e-6 else f"{value:.2e}"


def between(interval: Interval | None, spec: str = "") -> str:
    """Spell an interval: ``0.00131 – 0.00152``."""
    if interval is None:
        return ""
    low, high = (format(end, spec) if spec else nats(end) for end in interval)
    return f"{low} – {high}"


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first names, and how many more."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def storage(row: Row) -> str:
    """What most quantized weights are stored in; for what is not quantized, its largest dtype."""
    if not row.contains:
        return ", ".join(dict.fromkeys(e.format for e in row.errors.classes)) if row.errors else ""
    quantized = [c.storage for c in row.contains if c.quantized]
    return " + ".join(quantized[:3]) + (" + …" if len(quantized) > 3 else "") if quantized else row.contains[0].storage


def includes(row: Row) -> list[str]:
    """What a size contains beyond the language model's layers, and how embeddings are stored."""
    if not row.contains:
        return []
    parts = [f"{label} {kept}" for label, role in PARTS if (kept := row.storage_of(role))]
    absent = [label for label, there in (("vision", row.vision), ("MTP", row.mtp)) if not there]
    return [*parts, *(f"no {label}" for label in absent)]


PARTS = (("embeddings", "embedding"), ("lm_head", "lm_head"), ("vision", "vision"), ("MTP", "mtp"))
"""What people ask of a size, and the roles it is about."""
