"""Tables of benchmarks/calibration.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def tables(
    documents: Sequence[dict[str, Any]],
    formats: Iterable[str],
    methods: Iterable[str],
    study: Sequence[str],
    apart: str,
    rounded: Sequence[str],
) -> dict[str, str]:
    """Markdown by marker: the main table, what more tokens and all experts change, and rounded activations."""
    known = list(methods)
    some = [d for d in documents if any(r["part"] in rounded for r in d["rows"])]
    return {
        "calibration methods": "\n".join([about(documents), *main(documents, formats, known)]),
        "calibration w4a4": "\n".join(main(some, rounded, known)[1:]),
        "calibration tokens": "\n".join(tokens(documents, study, apart)),
    }


def about(documents: Sequence[dict[str, Any]]) -> str:
    """What was measured, and where."""
    first = documents[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    scored = ", ".join(
        f"{d['model']} {d['calibration']['length']}, {d['held_out']['tokens']:,} tokens" for d in documents
    )
    samples = first["calibration"]["samples"]
    return (
        f"{first['date']}, {first['machine']['cpu']}, {versions}. Calibrated with {samples} samples, evaluated on "
        f"other text (window length, tokens: {scored}). KL divergence from the source, nats per token × 1000. "
        "**Bold**: the smallest of its column; *italic*: not distinguishable from it (paired 95 % interval). Brackets "
        "give the output error: the squared error of a weight's outputs over their energy on the same text, averaged "
        "over the weights, × 1000."
    )


def main(documents: Sequence[dict[str, Any]], formats: Iterable[str], methods: list[str]) -> list[str]:
    """A part per format, a row per method, a column per model."""
    lines: list[str] = []
    names = [d["model"] for d in documents]
    notes: list[str] = []
    for fmt in formats:
        columns = [[r for r in d["rows"] if r["part"] == fmt] for d in documents]
        if not any(columns):
            continue
        heads = []
        for name, column in zip(names, columns, strict=True):
            kept = max((r["kept"] for r in column), default=0)
            heads.append(name + (" †" if kept else ""))
            if kept and "†" not in "".join(notes):
                notes.append("† some weights are kept because their K is no multiple of the block.")
        lines += ["", f"| `{fmt}` | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(names)]
        for method in methods:
            found = [next((r for r in column if r["method"] == method), None) for column in columns]
            if any(found):
                cells = [_cell(r, column) for r, column in zip(found, columns, strict=True)]
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines + (["", *notes] if notes else [])


def tokens(documents: Sequence[dict[str, Any]], study: Sequence[str], apart: str) -> list[str]:
    """For the models that have it: KL by number of samples, and with all tokens for all experts."""
    lines: list[str] = []
    for document in documents:
        rows = [r for r in document["rows"] if r["part"] == apart]
        ways = sorted({(r["all_experts"], r["samples"]) for r in rows})
        if len(ways) < 2:
            continue
        heads = [f"{samples}{', all experts' if everyone else ''}" for everyone, samples in ways]
        lines += ["", f"| {document['model']}, `nvfp4` | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(ways)]
        for method in study:
            cells = []
            for everyone, samples in ways:
                row = next(
                    (r for r in rows if (r["method"], r["all_experts"], r["samples"]) == (method, everyone, samples)),
                    None,
                )
                cells.append(f"{_number(row['kl'])} ({_number(_half(row))})" if row else "")
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        if document.get("experts"):
            seen = ", ".join(
                f"{c['least']:,} and {c['median']:,} with {samples} samples"
                for samples, c in document["experts"].items()
            )
            lines += ["", f"Tokens that reached the least used and the median expert: {seen}."]
    return lines[1:]


def _cell(row: Row | None, column: list[Row]) -> str:
    if row is None:
        return "–"
    best = min(column, key=lambda r: float(r["kl"]))
    number, error = _number(row["kl"]), f" ({_number(row['output_error'])})"
    if row is best:
        return f"**{number}**{error}"
    return (f"*{number}*" if best["name"] in row["same"] else number) + error


def _half(row: Row) -> float:
    return (row["kl_ci"][1] - row["kl_ci"][0]) / 2 if row["kl_ci"] else 0.0


def _number(kl: float) -> str:
    return f"{1000 * kl:.3g}"
