"""A checkpoint beside its source: what is missing, what differs, and how far each weight is from what it could be.

Every quantized weight is compared on a sample of its rows with its source, and the same rows rounded to nearest in the
same format (scales from the largest magnitude) stand beside it: what anybody gets without any effort.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.audit.compared_weight import ComparedWeight
from halfbyte.audit.finding import Finding, count, some, verb
from halfbyte.checkpoint import Reader
from halfbyte.checkpoint.files import read_small
from halfbyte.errors import HalfbyteError
from halfbyte.formats import Format
from halfbyte.formats.arrays import Floats
from halfbyte.models import Weight
from halfbyte.plan.configuration import PROVENANCE
from halfbyte.plan.sealed_provenance import calibrated_errors, is_sealed, read_provenance
from halfbyte.search import encode
from halfbyte.source.checkpoint import Checkpoint

ROWS = 256
"""Rows of a matrix, or of all experts of a stack together, that are compared by default."""
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "special_tokens_map.json",
)
_SMALL = 1 << 26
_SLAB = 128


class _Part(NamedTuple):
    """Sums of squares over the compared rows of one matrix: of the errors, of those of rounding, of the source."""

    name: str
    error: float
    nearest: float
    squares: float

    def plus(self, other: _Part) -> _Part:
        return _Part(self.name, self.error + other.error, self.nearest + other.nearest, self.squares + other.squares)

    @property
    def worse_db(self) -> float:
        if self.error <= 0:
            return 0.0
        if not math.isfinite(self.error) or self.nearest <= 0:
            return math.inf
        return 10 * math.log10(self.error / self.nearest) if math.isfinite(self.nearest) else 0.0


def compare_weights(
    ours: Checkpoint, source: Checkpoint, left: Reader, right: Reader, rows: int, progress: Callable[[int, int], None]
) -> tuple[list[ComparedWeight], list[Finding]]:
    """Errors of all quantized weights that the source has too, and findings about everything that both should share."""
    twins = {weight.name: weight for weight in ours.weights}
    compared: list[ComparedWeight] = []
    record = _record(ours)
    noted = calibrated_errors(record)
    missing: dict[str, list[str]] = {}
    changed: list[str] = []
    shapes: list[str] = []
    for number, weight in enumerate(source.weights, 1):
        twin = twins.get(weight.name)
        if twin is None:
            missing.setdefault(_kind(weight), []).append(weight.name)
        elif twin.shape != weight.shape:
            shapes.append(weight.name)
        elif twin.name in ours.formats and source.formats.get(weight.name) is None and len(twin.shape) > 1:
            result = _compare(ours, source, left, right, twin, weight, rows)
            if twin.name in noted or "training" in record:
                result.moved, result.outputs = True, _ratio(*noted.get(twin.name, (0.0, 0.0)))
            compared.append(result)
        elif (
            twin.name not in ours.formats
            and weight.name not in source.formats
            and _differs(ours, source, left, right, twin, weight, rows)
        ):
            changed.append(weight.name)
        progress(number, len(source.weights))
    return compared, [*_missing(missing), *_changed(changed, shapes), *_errors(compared)]


def _record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What halfbyte.json says, where halfbyte wrote the checkpoint and nobody changed the file since."""
    root = checkpoint.inventory.root
    try:
        sealed = root is not None and is_sealed(read_small(root / PROVENANCE))
        return read_provenance(root) if root is not None and sealed else {}
    except HalfbyteError:
        return {}


def _ratio(error: float, squares: float) -> float | None:
    return error / squares if squares else None


def compare_files(ours: Checkpoint, source: Checkpoint) -> Iterator[Finding]:
    """Tokenizer and template files that are missing or differ, and settings of generation."""
    here, there = ours.inventory, source.inventory
    if here.root is None or there.root is None or here.ggml_types:
        return
    missing = [
        name
        for name in (*_TEXT_FILES, "generation_config.json")
        if name in there.side_files and not _has(here.root, name)
    ]
    missing += [n for n in there.side_files if n.endswith("processor_config.json") and not _has(here.root, n)]
    if missing:
        what = f"{some(missing, 5)} of the source are missing"
        yield Finding("missing", "files-missing", what, tuple(missing), "`halfbyte repair` takes them from the source")
    differ = [
        n
        for n in _TEXT_FILES
        if n in there.side_files and _has(here.root, n) and not _same(here.root / n, there.root / n)
    ]
    if differ:
        what = f"{some(differ, 5)} differ from the source; a new tokenizer library may only write them otherwise"
        yield Finding(
            "note", "files-differ", what, tuple(differ), "`halfbyte repair --files` takes those of the source"
        )


def _has(root: Path, name: str) -> bool:
    return (root / name).is_file()


def _same(a: Path, b: Path) -> bool:
    return a.stat().st_size == b.stat().st_size and read_small(a, _SMALL) == read_small(b, _SMALL)


def _kind(weight: Weight) -> str:
    role = weight.role.removeprefix("quantized.")
    return next((tower for tower in ("mtp", "vision", "audio") if role.startswith(f"{tower}.")), role.split(".")[0])


def _cuts(weight: Weight, rows: int) -> Iterator[tuple[str, int, int]]:
    """(what, first, stop) of leading indices that are read together: each expert, or slabs spread over a matrix."""
    if len(weight.shape) > 2:
        yield from ((f"expert {e} of {weight.name}", e, e + 1) for e in range(weight.shape[0]))
        return
    total = weight.shape[0]
    slabs = max(1, rows // _SLAB)
    starts = {min(i * total // slabs, max(total - 1, 0)) // _SLAB * _SLAB for i in range(slabs)}
    yield from ((weight.name, first, min(first + _SLAB, total)) for first in sorted(starts))


def _projections(weight: Weight, what: str, rows: int, fmt: Format) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """The matrices that an expert holds, and rows spread over each."""
    total = weight.shape[-2]
    if len(weight.shape) < 3:
        yield what, np.arange(total)
        return
    each = min(max(16, rows // weight.shape[0]), total)
    parts = weight.row_parts if not weight.interleaved else ()
    for name, first, stop in parts or (("", 0, total),):
        # blocks of several rows stay whole
        chosen = np.linspace(first, stop - 1, each).astype(np.intp) if fmt.block[0] == 1 else np.arange(first, stop)
        yield f"{name} of {what}" if name else what, np.unique(chosen)


def _compare(
    ours: Checkpoint, source: Checkpoint, left: Reader, right: Reader, twin: Weight, weight: Weight, rows: int
) -> ComparedWeight:
    fmt = ours.formats[twin.name]
    parts: dict[str, _Part] = {}
    used = 0
    for cut, first, stop in _cuts(twin, rows):
        dense = source.read(right, weight, first, stop)
        stored = ours.read(left, twin, first, stop)
        for what, chosen in _projections(twin, cut, rows, fmt):
            picked = chosen[: dense.shape[-2]]
            here, there = (np.ascontiguousarray(a[..., picked, :], np.float32) for a in (stored, dense))
            parts[what] = parts.get(what, _Part(what, 0, 0, 0)).plus(_part(what, there, here, fmt))
            used += picked.size
    error, nearest = sum(part.error for part in parts.values()), sum(part.nearest for part in parts.values())
    squares = sum(part.squares for part in parts.values())
    worst = max(parts.values(), key=lambda part: part.worse_db)
    relmse, rounded = (x / squares if squares else math.inf if x else 0.0 for x in (error, nearest))
    return ComparedWeight(twin.name, twin.role, fmt.name, relmse, rounded, used, worst.name, worst.worse_db)


def _part(what: str, dense: Floats, stored: Floats, fmt: Format) -> _Part:
    with np.errstate(over="ignore", invalid="ignore"):
        error = float(np.square(stored.astype(np.float64) - dense).sum())
    try:
        nearest = float(np.square(encode(dense, fmt, "absmax").decode().astype(np.float64) - dense).sum())
    except HalfbyteError:
        nearest = math.nan  # no sample of rows fits this format
    return _Part(what, error, nearest, float(np.square(dense.astype(np.float64)).sum()))


def _differs(
    ours: Checkpoint, source: Checkpoint, left: Reader, right: Reader, twin: Weight, weight: Weight, rows: int
) -> bool:
    stop = min(rows, weight.shape[0]) if weight.shape else None
    first = 0 if weight.shape else None
    a, b = (c.read(r, w, first or 0, stop) for c, r, w in ((ours, left, twin), (source, right, weight)))
    return a.shape != b.shape or not np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True)


def _missing(missing: dict[str, list[str]]) -> Iterator[Finding]:
    for kind, names in missing.items():
        what = f"{count(len(names), 'weight')} of {kind} of the source {verb(len(names), 'are')} missing: {some(names)}"
        advice = "`halfbyte repair` takes them from the source"
        yield Finding("missing", f"source-{kind}-missing", what, tuple(names), advice)


def _changed(changed: list[str], shapes: list[str]) -> Iterator[Finding]:
    if shapes:
        what = (
            f"{count(len(shapes), 'weight')} {verb(len(shapes), 'have')} other "
            f"shapes than in the source: {some(shapes)}"
        )
        yield Finding("wrong", "other-shapes", what, tuple(shapes), "is this the right source?")
    if changed:
        what = (
            f"{count(len(changed), 'weight')} that {verb(len(changed), 'are')} not "
            f"quantized differ from the source: {some(changed)}"
        )
        yield Finding(
            "note",
            "kept-differ",
            what,
            tuple(changed),
            "smoothing (AWQ, SmoothQuant) changes norms and scales the weights behind them; else it is another model",
        )


def _errors(compared: list[ComparedWeight]) -> Iterator[Finding]:
    other = [w for w in compared if w.is_another]
    if other:
        what = (
            f"{count(len(other), 'weight')} {verb(len(other), 'have')} nothing in common with the source: "
            f"{some([w.name for w in other])} (relative error {other[0].relmse:.3g})"
        )
        yield Finding("wrong", "another-weight", what, tuple(w.name for w in other), "is this the right source?")
    moved = sum(w.moved for w in compared)
    if moved:
        what = (
            f"a calibration or a training moved {count(moved, 'weight')}, whose errors against the source say little; "
            "what halfbyte.json notes of their outputs counts"
        )
        yield Finding("note", "moved", what, advice="`halfbyte verify` checks that no file changed since")
    worse = sorted((w for w in compared if w.is_worse and not w.is_another), key=lambda w: -w.worse_db)
    if worse:
        first = worse[0]
        much = f"{first.worse_db:.0f} dB worse" if math.isfinite(first.worse_db) else "where rounding loses nothing"
        what = (
            f"{count(len(worse), 'weight')} {verb(len(worse), 'are')} worse than rounding to nearest in "
            f"{first.format} would be; most of all {first.worst} ({much})"
        )
        yield Finding(
            "poor", "worse-than-nearest", what, tuple(w.name for w in worse), "`halfbyte repair` encodes them again"
        )
