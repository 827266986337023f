"""Tables of benchmarks/allocation.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

VARIANTS = {
    "by hand": "by hand",
    "errors": "allocated, errors alone (all alike)",
    "structure": "allocated, errors and structure",
    "importance": "allocated, errors, structure and importance",
    "sensitivity": "allocated, sensitivities",
    "sensitivity, mixfp4": "allocated, sensitivities, MixFP4 allowed",
}


def tables(documents: Sequence[dict[str, Any]], hand: Sequence[str]) -> dict[str, str]:
    """Markdown by marker: against hand-written recipes, and measured curves."""
    return {"allocation": "\n".join(against(documents, hand)), "allocation curve": "\n".join(curve(documents))}


def against(documents: Sequence[dict[str, Any]], hand: Sequence[str]) -> list[str]:
    """A row per recipe and way, a column per model."""
    first = documents[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = [
        f"{first['date']}, {first['machine']['cpu']}, {versions}. KL divergence from the source on held-out text, nats "
        "per token × 1000; brackets give bits per weight over all weights. **Bold**: better than by hand beyond the "
        "paired 95 % interval; *italic*: worse.",
        "",
        "| recipe | | " + " | ".join(d["model"] for d in documents) + " |",
        "|---|---|" + "---:|" * len(documents),
    ]
    for recipe in hand:
        for suffix, words in VARIANTS.items():
            cells = []
            for document in documents:
                rows = {r["label"]: r for r in document["rows"]}
                row, base = rows.get(f"{recipe}, {suffix}"), rows.get(f"{recipe}, by hand")
                cells.append(_cell(row, base) if row and base else "–")
            lines.append(f"| `{recipe}` | {words} | " + " | ".join(cells) + " |")
    return lines


def curve(documents: Sequence[dict[str, Any]]) -> list[str]:
    """Allocations of several sizes, predicted and measured, and recipes with one format."""
    lines: list[str] = []
    for document in documents:
        lines += ["", f"| {document['model']} | bits per weight | KL | predicted |", "|---|---:|---:|---:|"]
        rows = [r for r in document["rows"] if r["kind"] == "plain" or r.get("curve")]
        for row in sorted(rows, key=lambda r: float(r["bits"])):
            name = f"`{row['recipe']}`" if row["kind"] == "plain" else "allocated"
            predicted = f"{1000 * row['predicted']:.3g}" if "predicted" in row else ""
            lines.append(f"| {name} | {row['bits']:.2f} | {1000 * row['kl']:.3g} | {predicted} |")
    return lines[1:]


def _cell(row: dict[str, Any], base: dict[str, Any]) -> str:
    text = f"{1000 * row['kl']:.3g}"
    if row is not base and base["label"] not in row["same"]:
        text = f"**{text}**" if row["kl"] < base["kl"] else f"*{text}*"
    return f"{text} ({row['bits']:.2f})"
