"""The HTML report: one file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte.checkpoint import write_file_atomic
from halfbyte.report import bundle, charts, datasets
from halfbyte.report.read import Inputs, read_inputs
from halfbyte.report.source_provenance import provenance
from halfbyte.report.studies import Study, make_studies
from halfbyte.report.table import columns, lines
from halfbyte.report.wording import includes, nats, size, task_name

MAX_GROUPS = 40
"""Bars in the chart of sensitivity: the worst groups."""
CALIBRATED = (
    "Methods that use activations (GPTQ, importance) raise this error but lower the error of the outputs. Compare such "
    "checkpoints by the error weighted by activations, shown in the table and in the tooltips."
)
NARROW = 12
"""Layers of a map that takes half of the page's width."""


@dataclass
class Figure:
    """A chart with its caption. ``menus``: parameters of the chart that the reader chooses, with their values."""

    id: str
    title: str
    caption: str
    spec: dict[str, Any]
    wide: bool = True
    menus: list[tuple[str, str, list[str]]] = field(default_factory=list)


def write_report(paths: Sequence[str | Path], out: str | Path) -> Inputs:
    """Write one HTML file about results files, or folders of them; gives what was read.

    ReportError where a file is missing or damaged; HalfbyteError without the extra ``report``.
    """

    bundle.need_charts()
    inputs = read_inputs(paths)
    write_file_atomic(Path(out), render(make_studies(inputs)).encode())
    return inputs


def render(studies: Sequence[Study]) -> str:
    """Render the page as HTML."""
    from jinja2 import Environment, StrictUndefined

    data: dict[str, datasets.Records] = {}
    sections: list[dict[str, Any]] = [
        {
            "id": f"study-{number}",
            "study": study,
            "columns": columns(study) if study.rows else [],
            "lines": lines(study) if study.rows else [],
            "figures": _figures(study, f"s{number}", data),
            "facts": _facts(study),
            "shown": _first_shown(study),
            "notes": _notes(study),
            "provenance": provenance(study),
        }
        for number, study in enumerate(studies, 1)
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    script, vega = _asset("report.js"), bundle.vega()
    drawn = {"data": data, "specs": {f.id: f.spec for section in sections for f in section["figures"]}}
    return environment.from_string(_asset("report.html.jinja")).render(
        title=_title(studies),
        sections=sections,
        charts=bundle.pack(json.dumps(drawn, allow_nan=False, separators=(",", ":"))),
        style=_asset("report.css"),
        script=script,
        vega=vega.packed,
        policy=bundle.policy(bundle.sha256(script), vega.sha256),
        version=halfbyte.__version__,
    )


def _title(studies: Sequence[Study]) -> str:
    names = list(dict.fromkeys(study.name for study in studies))
    return " · ".join(names) if len(names) <= 2 else f"{len(names)} models"


def _asset(name: str) -> str:
    return resources.files("halfbyte.report").joinpath("assets").joinpath(name).read_text(encoding="utf-8")


def _figures(study: Study, prefix: str, data: dict[str, datasets.Records]) -> list[Figure]:
    figures: list[Figure] = []

    def add(key: str, records: datasets.Records, title: str, caption: str, spec: dict[str, Any], **more: Any) -> None:
        data[f"{prefix}-{key}"] = records
        figures.append(Figure(f"{prefix}-{key}", title, caption, spec, **more))

    name = f"{prefix}-{{}}".format
    if sizes := datasets.sizes(study):
        floor = study.noise_floor.kl.mean if study.noise_floor and study.noise_floor.kl else None
        caption = (
            "Bars: 95 % intervals. The line joins those than which no other is nearer at that size, give or take 0.5 %."
        )
        caption += " Dashed: the noise floor." if floor else ""
        add("sizes", sizes, "Size and quality", caption, charts.sizes(name("sizes"), _range(sizes, "kl", floor), floor))
    if shares := datasets.percentiles(study):
        many = len({r["checkpoint"] for r in shares})
        caption = "Most tokens are predicted almost alike; the tail shows what a mean hides."
        add(
            "kl",
            shares,
            "Divergence per token",
            caption,
            charts.percentiles(name("kl"), _range(shares, "kl"), many),
            wide=False,
        )
    if errors := datasets.weights(study):
        many = len({r["checkpoint"] for r in errors})
        caption = "Squared error / sum of squares; one mark per role and layer."
        if any(r["weighted"] is not None for r in errors):
            caption += f" {CALIBRATED}"
        add(
            "spread",
            errors,
            "Errors of weights",
            caption,
            charts.spread(name("spread"), _range(errors, "relmse"), many),
            wide=False,
        )
        add_maps(study, errors, name, add)
    if histograms := datasets.scales(study):
        shown = list(dict.fromkeys(r["checkpoint"] for r in histograms))
        menu = [(charts.CHECKPOINT, "Checkpoint", shown)]
        caption = "Before the global scale. A scale at either end of its type's range is a sign of clipping."
        add("scales", histograms, "Block scales", caption, charts.scales(name("scales")), menus=menu)
    for number, document in enumerate(study.sensitivity):
        records = datasets.sensitivity(document)
        rest = f" The worst {MAX_GROUPS} of {len(records)} groups." if len(records) > MAX_GROUPS else ""
        whole = next((g.kl.mean for g in document.groups if g.group == "all"), None)
        caption = (
            f"One {document.by} at a time in {document.recipe}, the rest as in the source. {document.protocol.note}."
        )
        caption += f" The whole recipe: {nats(whole)}.{rest}" if whole is not None else rest
        key, records = f"sensitivity{number}", records[:MAX_GROUPS]
        add(key, records, f"Sensitivity to {document.recipe}", caption, charts.sensitivity(name(key), len(records)))
    for number, allocation in enumerate(study.allocations):
        key = f"frontier{number}"
        caption = f"Ring: {allocation.recipe}. Losses are predictions, not measurements."
        points = datasets.frontier(allocation)
        add(key, points, "Allocation", caption, charts.frontier(name(key), _range(points, "loss")))
    return figures


def add_maps(study: Study, errors: datasets.Records, name: Any, add: Any) -> None:
    """Layer x role: errors, and the tables that blocks chose."""
    checkpoints = list(dict.fromkeys(r["checkpoint"] for r in errors))
    roles = len({r["role"] for r in errors})
    chosen = datasets.tables(study)
    # few layers: both maps fit side by side
    wide = not chosen or len({r["layer"] for r in errors}) > NARROW
    menu = (charts.CHECKPOINT, "Checkpoint", checkpoints)
    caption = "Relative squared error. The colours span the errors of the checkpoint that is shown."
    if any(r["weighted"] is not None for r in errors):
        caption += f" {CALIBRATED}"
    spec = charts.heat_map(name("errors"), roles)
    add("errors", errors, "Errors by layer and role", caption, spec, menus=[menu], wide=wide)
    if chosen:
        menus = [
            (charts.CHECKPOINT, "Checkpoint", list(dict.fromkeys(r["checkpoint"] for r in chosen))),
            (charts.TABLE, "Codebook", list(dict.fromkeys(r["table"] for r in chosen))),
        ]
        spec = charts.block_types(name("tables"), _range(chosen, "share"), len({r["role"] for r in chosen}))
        caption = "Share of the blocks for which this codebook has the smallest error."
        add("tables", chosen, "Block types by layer and role", caption, spec, menus=menus, wide=wide)


def _range(records: datasets.Records, key: str, *more: float | None) -> charts.Ends:
    values = [*(record[key] for record in records), *(value for value in more if value)]
    return min(values), max(values)


def _first_shown(study: Study) -> str:
    """Of the smallest checkpoints (up to a tenth larger than the least) the nearest to the source."""
    measured = [(row.bytes, row.kl.mean, row.label) for row in study.quantized if row.bytes and row.kl]
    least = min((size for size, _, _ in measured), default=0)
    return min(((kl, name) for size, kl, name in measured if size <= 1.1 * least), default=(0.0, ""))[1]


def _facts(study: Study) -> list[tuple[str, str, str]]:
    """What a reader wants first: label, value, detail."""
    facts = []
    if study.source and study.source.bytes:
        bits = f"{study.source.bits_per_weight:.4g} bits per weight" if study.source.bits_per_weight else ""
        facts.append(("Source", size(study.source.bytes), bits))
    smallest = min((row for row in study.quantized if row.bytes), key=lambda row: row.bytes or 0, default=None)
    if smallest and smallest.bytes:
        facts.append(("Smallest", size(smallest.bytes), smallest.label))
    nearest = min(((row.kl.mean, row.label) for row in study.quantized if row.kl), default=None)
    if nearest:
        facts.append(("Smallest KL divergence", nats(nearest[0]), nearest[1]))
    if study.noise_floor and study.noise_floor.kl:
        facts.append(("Noise floor", nats(study.noise_floor.kl.mean), study.noise_floor.how))
    return facts


def _notes(study: Study) -> list[tuple[str, str]]:
    """Protocols, by what they are about."""
    text, kl = study.protocol, study.kl_protocol
    notes = [("Not valid", row.invalid) for row in study.rows if row.invalid]
    if study.noise_floor and study.noise_floor.invalid:
        notes.append(("No noise floor", study.noise_floor.invalid))
    if text:
        notes.append(("Perplexity" if kl and kl.key != text.key else "Perplexity and KL divergence", text.note))
    if kl and (text is None or kl.key != text.key):
        notes.append(("KL divergence", kl.note))
    if (parts := {", ".join(includes(row)) for row in study.rows}) and len(parts) == 1 and parts != {""}:
        notes.append(("Every size contains", parts.pop()))
    for name in study.tasks:
        task = next(row.tasks[name] for row in study.rows if name in row.tasks)
        notes.append((task_name(name), f"{task.questions:,} questions, {task.protocol}"))
    return notes
