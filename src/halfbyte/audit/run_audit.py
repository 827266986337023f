"""The whole audit: a checkpoint, with or without its source, as one document."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.audit.against_source import ROWS, compare_files, compare_weights
from halfbyte.audit.compared_weight import ComparedWeight
from halfbyte.audit.finding import ORDER, Finding, ordered
from halfbyte.audit.stored_scales import check_scales
from halfbyte.audit.structure import check_structure
from halfbyte.checkpoint import Inventory, Reader
from halfbyte.errors import CheckpointError
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.overview import Overview, overview

SCHEMA = 1


@dataclass
class Audit:
    """What an audit found; ``findings`` the gravest first, ``compared`` empty without a source.

    ``overview`` is None where the checkpoint is too damaged to be read as weights.
    """

    checkpoint: str
    overview: Overview | None
    against: str | None
    findings: list[Finding]
    compared: list[ComparedWeight] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        """The findings that speak against the checkpoint."""
        return [finding for finding in self.findings if finding.is_problem]

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    @property
    def breaks(self) -> dict[str, list[str]]:
        """Engines that are known to refuse this checkpoint or to compute with other numbers, and why."""
        engines = self.overview.engines if self.overview else {}
        return {
            engine: reasons
            for engine, notes in engines.items()
            if (reasons := [note.what for note in notes if note.effect in ("wrong", "refuses") and not note.hardware])
        }

    @property
    def verdict(self) -> str:
        """One line that says it all."""
        roles = self.overview.roles if self.overview else []
        what = "+".join(sorted({name for role in roles for name in role.formats})) or "not quantized"
        if self.overview is None:
            return f"broken: {self.findings[0].what}"
        if self.ok:
            beside = "against its source" if self.against else "without its source"
            return f"sound: {what}, no problem found {beside}"
        counts = [(kind, sum(f.severity == kind for f in self.findings)) for kind in ORDER if kind != "note"]
        grave = next(kind for kind, number in counts if number)
        word = {"wrong": "broken", "missing": "incomplete", "poor": "poor"}[grave]
        return f"{word}: {what}, {', '.join(f'{number} {kind}' for kind, number in counts if number)}"

    def document(self) -> dict[str, Any]:
        """The audit as JSON values."""
        summary = self.overview
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "ok": self.ok,
            "checkpoint": self.checkpoint,
            "against": self.against,
            "family": summary.family if summary else None,
            "dialect": summary.dialect if summary else None,
            "parameters": summary.parameters if summary else None,
            "data_bytes": summary.data_bytes if summary else None,
            "bits_per_weight": summary.bits_per_weight if summary else None,
            "findings": [asdict(finding) for finding in self.findings],
            "engines": {
                engine: [{"effect": n.effect, "what": n.what, "hardware": n.hardware, "link": n.link} for n in notes]
                for engine, notes in (summary.engines if summary else {}).items()
            },
            "weights": [asdict(w) for w in self.compared],
        }


def audit(
    checkpoint: str | Path,
    against: str | Path | None = None,
    *,
    revision: str | None = None,
    rows: int = ROWS,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Look for everything that is known to be wrong in quantized checkpoints.

    ``checkpoint`` and ``against`` are folders, files or hub ids; ``revision`` is that of the source. ``rows``: of each
    weight, to compare with the source. ``progress`` gets how many weights of the source were compared, and of how
    many. CheckpointError where a checkpoint cannot be read at all.
    """
    inventory = Inventory.open(checkpoint)
    source = None if against is None else Checkpoint(Inventory.open(against, revision))
    try:
        ours = Checkpoint(inventory)
    except CheckpointError as error:
        name = None if source is None else source.inventory.source
        return Audit(inventory.source, None, name, [Finding("wrong", "unreadable", str(error))])
    return examine(ours, source, rows, progress)


def examine(
    ours: Checkpoint,
    source: Checkpoint | None = None,
    rows: int = ROWS,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Audit an open checkpoint; weights whose tensors are missing are taken out of it."""
    findings = [*drop_incomplete(ours), *check_structure(ours)]
    compared: list[ComparedWeight] = []
    with Reader(ours.inventory) as left:
        findings += check_scales(ours, left)
        if source is not None:
            with Reader(source.inventory) as right:
                compared, more = compare_weights(ours, source, left, right, rows, progress or (lambda *_: None))
            findings += [*more, *compare_files(ours, source)]
    name = None if source is None else source.inventory.source
    return Audit(ours.inventory.source, overview(ours), name, ordered(findings), compared)


def drop_incomplete(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Take weights out of a checkpoint whose tensors are missing or have wrong shapes, and say so."""
    broken = {}
    for weight in checkpoint.weights:
        try:
            checkpoint.tensors_of(weight)
        except CheckpointError as error:
            broken[weight.name] = str(error)
    if broken:
        more = f"; so do {len(broken) - 1:,} more weights" if len(broken) > 1 else ""
        yield Finding("wrong", "incomplete-weight", next(iter(broken.values())) + more, tuple(broken))
        checkpoint.weights = [w for w in checkpoint.weights if w.name not in broken]
        for name in broken:
            del checkpoint.formats[name]
