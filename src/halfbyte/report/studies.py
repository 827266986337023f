"""Documents that belong together: one study per source model and protocol."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePath

from halfbyte.report.read import Inputs
from halfbyte.report.results_schema import (
    Allocation,
    Comparison,
    Errors,
    NoiseFloor,
    Protocol,
    Results,
    Row,
    Sensitivity,
)


@dataclass
class Study:
    """Checkpoints of one source that were measured alike; ``rows`` begins with the source, where there is one."""

    name: str
    source: Row | None = None
    rows: list[Row] = field(default_factory=list)
    noise_floor: NoiseFloor | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    results: list[Results] = field(default_factory=list)
    sensitivity: list[Sensitivity] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)

    @property
    def quantized(self) -> list[Row]:
        """All rows but the source."""
        return [row for row in self.rows if row is not self.source]

    @property
    def protocol(self) -> Protocol | None:
        """What perplexity was measured on."""
        return next((row.protocol for row in self.rows if row.protocol), None)

    @property
    def kl_protocol(self) -> Protocol | None:
        """What divergence was measured on."""
        return next((row.kl_protocol for row in self.rows if row.kl_protocol), None)

    @property
    def tasks(self) -> list[str]:
        """Names of tasks, MMLU-Pro first."""
        names = dict.fromkeys(task for row in self.rows for task in row.tasks)
        return sorted(names, key=lambda name: name != "mmlu_pro")


def make_studies(inputs: Inputs) -> list[Study]:
    """Results of the same source under the same protocols share a study, in which a checkpoint has one row.

    So one file may hold divergences and another one the tasks of the same checkpoints. Errors, sensitivities and
    allocations go to the study of their model, or make one.
    """
    studies: list[Study] = []
    for document in inputs.results:
        study = next((s for s in studies if _fits(s, document)), None)
        if study is None:
            study = Study(document.source or document.rows[0].name)
            studies.append(study)
        _add(study, document)
    for errors in inputs.errors:
        _attach_errors(studies, errors)
    for sensitivity in inputs.sensitivity:
        _study_of(studies, base(sensitivity.source)).sensitivity.append(sensitivity)
    for allocation in inputs.allocations:
        # an allocation names no model, only its recipe
        made = [s for s in studies if any(row.recipe == allocation.recipe for row in s.rows)]
        owners = made or (studies if len(studies) == 1 else [])
        (owners[0] if owners else _study_of(studies, allocation.recipe)).allocations.append(allocation)
    return studies


def base(path: str) -> str:
    """The last part of a path or hub id."""
    return PurePath(path.replace("\\", "/")).name or path


def _source_of(document: Results) -> Row | None:
    return next((row for row in document.rows if row.name == document.source), None)


def _fits(study: Study, document: Results) -> bool:
    source = _source_of(document)
    if source is None or study.source is None or source.fingerprint != study.source.fingerprint:
        return False
    rows = document.rows
    pairs = (
        (study.protocol, next((row.protocol for row in rows if row.protocol), None)),
        (study.kl_protocol, next((row.kl_protocol for row in rows if row.kl_protocol), None)),
    )
    if any(ours and theirs and ours.key != theirs.key for ours, theirs in pairs):
        return False
    return all(_mergeable(known, row) for row in rows for known in study.rows if _same(known, row))


def _same(a: Row, b: Row) -> bool:
    return a.fingerprint == b.fingerprint and a.fingerprint is not None and a.activations == b.activations


def _mergeable(a: Row, b: Row) -> bool:
    """Whether nothing that both have measured differs."""
    tasks = all(a.tasks[name] == b.tasks[name] for name in a.tasks.keys() & b.tasks.keys())
    return tasks and all(
        None in (x, y) or x == y for x, y in ((a.perplexity, b.perplexity), (a.kl, b.kl), (a.dtype, b.dtype))
    )


def _add(study: Study, document: Results) -> None:
    study.results.append(document)
    document = _distinct(study, document)
    study.comparisons += [c for c in document.comparisons if c not in study.comparisons]
    study.noise_floor = study.noise_floor or document.noise_floor
    for row in document.rows:
        at = next((i for i, known in enumerate(study.rows) if _same(known, row)), None)
        if at is None:
            study.rows.append(row)
        else:
            merged = _merge(study.rows[at], row)
            if study.rows[at] is study.source:
                study.source = merged
            study.rows[at] = merged
        if study.source is None and row.name == document.source:
            study.source = row


def _distinct(study: Study, document: Results) -> Results:
    """The document, with other names for checkpoints that share theirs with another one of the study."""
    new: dict[str, str] = {}
    for row in document.rows:
        known = next((r for r in study.rows if _same(r, row)), None)
        if known is not None:
            new[row.name] = known.name
        elif any(r.label == row.label for r in study.rows):
            new[row.name] = f"{row.name} ({(row.fingerprint or 'no fingerprint')[:8]})"
    if all(old == name for old, name in new.items()):
        return document

    def renamed(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(new.get(name, name) for name in names)

    rows = []
    for row in document.rows:
        same = row.indistinguishable
        others = {"kl": renamed(same.kl), "perplexity": renamed(same.perplexity)}
        update = {"name": new.get(row.name, row.name), "indistinguishable": same.model_copy(update=others)}
        rows.append(row.model_copy(update=update))
    pairs = [c.model_copy(update={"a": new.get(c.a, c.a), "b": new.get(c.b, c.b)}) for c in document.comparisons]
    source = document.source and new.get(document.source, document.source)
    return document.model_copy(update={"rows": tuple(rows), "comparisons": tuple(pairs), "source": source})


def _merge(first: Row, second: Row) -> Row:
    """What the first has not measured comes from the second."""
    values = {name: getattr(second, name) for name in type(first).model_fields if getattr(first, name) is None}
    if first.kl is None:
        values["indistinguishable"] = second.indistinguishable
    return first.model_copy(update={**values, "tasks": {**second.tasks, **first.tasks}})


def _attach_errors(studies: list[Study], errors: Errors) -> None:
    name = base(errors.out)
    hits = [(s, i) for s in studies for i, row in enumerate(s.rows) if name in (row.name, base(row.path))]
    hits = [h for h in hits if base(errors.against) in (h[0].name, base(h[0].name))] or hits
    for study, index in hits[:1]:
        study.rows[index] = study.rows[index].model_copy(update={"errors": errors})
    if not hits:
        _study_of(studies, base(errors.against)).rows.append(Row(name=name, path=errors.out, errors=errors))


def _study_of(studies: list[Study], name: str) -> Study:
    """The study of this model, made if need be."""
    matching: Iterable[Study] = (s for s in studies if name in (s.name, base(s.name)))
    study = next(iter(matching), None)
    if study is None:
        study = Study(name)
        studies.append(study)
    return study
