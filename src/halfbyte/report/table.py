"""The table of checkpoints that the field publishes."""

from __future__ import annotations

from dataclasses import dataclass, field

from halfbyte.report.results_schema import Row
from halfbyte.report.studies import Study
from halfbyte.report.wording import between, includes, nats, size, some, storage, task_name


@dataclass(frozen=True)
class Column:
    """A heading; ``title`` explains it. Numbers are set to the right and sorted as numbers."""

    label: str
    title: str
    number: bool = True


@dataclass(frozen=True)
class Cell:
    """A text with a smaller one below it; ``order`` is what it is sorted by.

    ``same``: names of rows that cannot be told from this one by this number, and ``note`` the sentence that says so.
    """

    text: str
    below: str = ""
    order: float | str | None = None
    best: bool = False
    same: tuple[str, ...] = ()
    note: str = ""


@dataclass
class Line:
    """A checkpoint; ``parts`` is what its size consists of: storage, parameters, bytes, roles."""

    name: str
    source: bool
    cells: list[Cell]
    parts: list[tuple[str, str, str, str]] = field(default_factory=list)


NOT_VALID = "not valid"
WEIGHTED = "Weighted by activations"
CONTAINS = "Size contains"
"""A column where sizes differ in that; else it is said once, below the table."""


def columns(study: Study) -> list[Column]:
    """Only what at least one checkpoint has."""
    rows = study.rows
    shown = [
        Column("Checkpoint", "Name of the folder; below it recipe and dialect", number=False),
        Column("Format", "How quantized weights are stored", number=False),
        Column("Size", "Bytes of all tensors"),
        Column("Bits", "Bits per weight: 8 × bytes of all tensors / number of weights"),
    ]
    if len({tuple(includes(row)) for row in rows}) > 1:
        explanation = "What is part of the size beside the layers, and how it is stored"
        shown.append(Column(CONTAINS, explanation, number=False))
    if any(row.errors for row in rows):
        shown.append(Column("relMSE", "Squared error of the quantized weights / their squared sum"))
    if any(row.errors and row.errors.total.calibrated_relmse is not None for row in rows):
        explanation = "The same of their outputs on the calibration text, which GPTQ and importance make small"
        shown.append(Column(WEIGHTED, explanation))
    for task in study.tasks:
        shown.append(Column(task_name(task), "Accuracy, with its 95 % interval (Wilson)"))
    if any(row.kl or row.invalid for row in study.quantized):
        shown.append(Column("KL mean", "KL(source ‖ checkpoint) in nats per token, with its 95 % interval"))
        shown.append(Column("Same top-1", "Share of tokens whose most likely next token is the source's"))
    if any(row.perplexity is not None or row.invalid for row in rows):
        shown.append(Column("Perplexity", "Below it the change from the source, with its paired 95 % interval"))
    return shown


def lines(study: Study) -> list[Line]:
    """A line per checkpoint, in the order of the results."""
    names = [column.label for column in columns(study)]
    least = min((row.kl.mean for row in study.quantized if row.kl), default=None)
    table_lines = []
    for row in study.rows:
        is_source = row is study.source
        cells = [_name(row, is_source), Cell(storage(row), order=storage(row)), _size(row), _bits(row)]
        if CONTAINS in names:
            cells.append(_contains(row))
        if "relMSE" in names:
            relmse = row.errors.total.relmse if row.errors else None
            cells.append(Cell("" if relmse is None else f"{relmse:.5f}", order=relmse))
        if WEIGHTED in names:
            weighted = row.errors.total.calibrated_relmse if row.errors else None
            cells.append(Cell("" if weighted is None else f"{weighted:.5f}", order=weighted))
        cells += [_task(study, row, task) for task in study.tasks]
        if "KL mean" in names:
            cells += [Cell("–"), Cell("–")] if is_source else _divergence(row, least)
        if "Perplexity" in names:
            cells.append(_perplexity(row))
        parts = [(c.storage, f"{c.parameters:,}", size(c.bytes), ", ".join(c.roles)) for c in row.contains]
        table_lines.append(Line(row.label, is_source, cells, parts))
    return table_lines


def _name(row: Row, is_source: bool) -> Cell:
    details = [row.recipe if row.recipe != row.name else None, row.dialect]
    if row.loaded_by == "transformers":
        details.append("loaded by transformers")
    return Cell(row.label, "source" if is_source else " · ".join(a for a in details if a), row.label.lower())


def _size(row: Row) -> Cell:
    return Cell("" if row.bytes is None else size(row.bytes), order=row.bytes)


def _contains(row: Row) -> Cell:
    return Cell("", below=", ".join(includes(row)), order=", ".join(includes(row)))


def _bits(row: Row) -> Cell:
    bits = row.bits_per_weight
    return Cell("" if bits is None else f"{bits:.2f}", order=bits)


def _divergence(row: Row, least: float | None) -> list[Cell]:
    if row.invalid:
        return [Cell(NOT_VALID, note=f"Not valid: {row.invalid}."), Cell(NOT_VALID)]
    if row.kl is None:
        return [Cell(""), Cell("")]
    same, note = row.indistinguishable.kl, ""
    if row.indistinguishable.noise:
        note = f"The divergence of {row.label} is within the noise floor: it says nothing."
    elif same:
        note = f"The divergence of {row.label} is not distinguishable from that of {some(same, 8)}."
    ci = row.kl_ci.mean if row.kl_ci else None
    mean = Cell(nats(row.kl.mean), between(ci), row.kl.mean, row.kl.mean == least, same, note)
    return [mean, Cell(f"{row.kl.top1:.2%}", order=row.kl.top1)]


def _perplexity(row: Row) -> Cell:
    if row.invalid:
        return Cell(NOT_VALID, note=f"Not valid: {row.invalid}.")
    if row.perplexity is None:
        return Cell("")
    ratio = row.perplexity_ratio
    if ratio is None:
        return Cell(f"{row.perplexity:.3f}", order=row.perplexity)
    change = _signed(ratio.value - 1)
    if ratio.ci is None:
        return Cell(f"{row.perplexity:.3f}", change, row.perplexity)
    low, high = ratio.ci
    reach = f"{_signed(low - 1)} to {_signed(high - 1)}"
    same = low <= 1 <= high
    note = f"The perplexity of {row.label} is not distinguishable from the source's ({reach})." if same else ""
    return Cell(f"{row.perplexity:.3f}", f"{change}, {reach}", row.perplexity, note=note)


def _signed(share: float) -> str:
    return f"{share:+.2%}".replace("-", "−")


def _task(study: Study, row: Row, name: str) -> Cell:
    task = row.tasks.get(name)
    if row.invalid:
        return Cell(NOT_VALID)
    if task is None:
        return Cell("")
    note = ""
    source = study.source.name if study.source else None
    pair = next((c for c in study.comparisons if c.task == name and {c.a, c.b} == {source, row.name}), None)
    if pair is not None and not pair.significant:
        note = f"{row.label} is not distinguishable from the source on {task_name(name)} (McNemar, p = {pair.p:.2g})."
    return Cell(f"{task.value:.2%}", between(task.ci, ".2%"), task.value, note=note)
