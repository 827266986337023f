"""What there is to decide: units of weights, and what every format would cost each of them in bytes and in loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfbyte.allocate.prior import HEAD, STREAM
from halfbyte.calibration import Calibration
from halfbyte.checkpoint import Reader, nbytes
from halfbyte.dialects import Dialect
from halfbyte.errors import CheckpointError, FormatError, PlanError
from halfbyte.evaluate.sensitivity_file import ALL, read_sensitivity
from halfbyte.formats import Format, get_format
from halfbyte.models import Weight
from halfbyte.models.roles import LINEAR, bare_role, is_under
from halfbyte.models.tied import is_tied
from halfbyte.search import encode, get_search
from halfbyte.source.checkpoint import FLOATS, Checkpoint

KEEP = "keep"
MIXED = "mixed"  # what a sensitivity file calls a group of several formats
SAMPLE_BYTES = 32 << 20  # of a weight that are looked at, spread over its experts or rows
Progress = Callable[[int, int], None]


@dataclass
class Choice:
    """A format for a unit: stored ``bytes``, relative output error ``error`` and predicted ``loss``."""

    format: str
    bytes: int
    error: float
    loss: float = 0.0


@dataclass
class AllocationUnit:
    """Weights that get one format: a fusion group, the experts of a layer, tied embeddings, or a single weight.

    ``errors`` are relative output errors by format, also in formats that are no choice.
    """

    name: str
    weights: list[Weight]
    choices: list[Choice] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Elements of all its weights."""
        return sum(int(np.prod(w.shape)) for w in self.weights)


def make_units(
    checkpoint: Checkpoint, dialect: Dialect, formats: Sequence[str], roles: Sequence[str] = ("linear",)
) -> list[AllocationUnit]:
    """The units of the weights of some ``roles``, each with the formats that its shape and the dialect allow.

    Errors are still unknown (``measure``). PlanError if no unit has a choice.
    """
    known = {name: get_format(name) for name in formats if name != KEEP}
    grouped: dict[str, AllocationUnit] = {}
    ends = [w.name for w in checkpoint.weights if w.role in (STREAM, HEAD)]
    tied = is_tied(checkpoint.inventory.config)
    for weight in (w.untransposed() for w in checkpoint.weights):
        if not _is_chosen(weight, roles) or weight.dtype not in FLOATS:
            continue
        key = weight.group or weight.name
        if is_under(bare_role(weight.role), "experts"):
            key = f"{weight.name.partition('.experts.')[0]}.experts"
        elif tied and weight.role in (STREAM, HEAD):
            key = ends[0]  # one tensor for an engine, also where a checkpoint holds it twice
        grouped.setdefault(key, AllocationUnit(key, [])).weights.append(weight)
    for unit in grouped.values():
        unit.choices = [Choice(KEEP, sum(nbytes(w.dtype, w.shape) for w in unit.weights), 0.0)]
        for name, fmt in known.items():
            if not any(fmt.problem(w.shape) or dialect.spelling.problem(w, fmt) for w in unit.weights):
                outputs = (o for w in unit.weights for o in dialect.spelling.outputs(w, fmt))
                unit.choices.append(Choice(name, sum(nbytes(o.dtype, o.shape) for o in outputs), 0.0))
    units = [unit for unit in grouped.values() if len(unit.choices) > 1]
    if not units:
        raise PlanError(
            f"none of the formats {', '.join(known) or '(none)'} can hold a weight of the roles {', '.join(roles)} in "
            f"the dialect {dialect.name}; choose others"
        )
    return units


def _is_chosen(weight: Weight, roles: Sequence[str]) -> bool:
    prefixes = [p for role in roles for p in (LINEAR if role == "linear" else (role,))]
    return len(weight.shape) > 1 and any(is_under(weight.role, p) for p in prefixes)


def measure(
    checkpoint: Checkpoint,
    units: Sequence[AllocationUnit],
    searches: Mapping[str, str] | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    measured: Sequence[Measured] = (),
) -> None:
    """Fill in the errors of all choices: the weighted squared error over the weighted sum of squares.

    With importance this is the relative error of a weight's output. Where a unit has several weights, theirs are
    added. Large weights are sampled evenly. Errors in the formats that sensitivities were ``measured`` in are needed
    too, so that they can be scaled to others.
    """
    searches = searches or {}
    with Reader(checkpoint.inventory) as reader:
        for number, unit in enumerate(units):
            names = {w.name for w in unit.weights}
            wanted = {c.format for c in unit.choices} | {m.format for m in measured if names & m.weights}
            wanted -= {KEEP, MIXED}
            unit.errors = dict.fromkeys(sorted(wanted), 0.0)
            for weight in unit.weights:
                array, columns = _sample(checkpoint, reader, weight, calibration)
                for name in unit.errors:
                    unit.errors[name] += _error(array, get_format(name), searches.get(name, "sweep"), columns)
            for choice in unit.choices:
                choice.error = unit.errors.get(choice.format, 0.0)
            if progress:
                progress(number + 1, len(units))


def _sample(
    checkpoint: Checkpoint, reader: Reader, weight: Weight, calibration: Calibration | None
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Some experts of a stack or some rows of a matrix, and the importance of their columns."""
    per = int(np.prod(weight.shape[1:])) * 4
    count = max(1, min(weight.shape[0], SAMPLE_BYTES // per))
    if len(weight.shape) == 2:
        # rows at one end would be those of one head: take them in eight pieces, in whole square blocks
        length = weight.shape[0] if count == weight.shape[0] else max(128, count // 8 // 128 * 128)
        starts = np.linspace(0, weight.shape[0] - length, 1 if length == weight.shape[0] else 8).astype(int)
        pieces = [(int(s) // 128 * 128, int(s) // 128 * 128 + length) for s in starts]
    else:
        pieces = [(int(e), int(e) + 1) for e in np.unique(np.linspace(0, weight.shape[0] - 1, count).astype(int))]
    arrays = [np.asarray(checkpoint.read(reader, weight, *piece), dtype=np.float32) for piece in pieces]
    array = np.concatenate(arrays)
    if calibration is None or weight.name not in calibration.matched.values:
        return array, None
    importances = [calibration.slice(weight.name, *piece).importance for piece in pieces]
    columns = [c for c in importances if c is not None]
    return array, columns[0] if columns[0].ndim == 1 else np.concatenate(columns)


def _error(array: NDArray[np.float32], fmt: Format, search: str, columns: NDArray[np.float32] | None) -> float:
    try:
        get_search(search, fmt)
    except FormatError:
        search = "absmax"
    values = encode(array, fmt, search, columns).decode()
    weights = np.float32(1) if columns is None else columns[..., None, :] if columns.ndim == 2 else columns
    squares = float((weights * np.square(array)).sum(dtype=np.float64))
    return float((weights * np.square(values - array)).sum(dtype=np.float64)) / squares if squares else 0.0


def predict(
    units: Sequence[AllocationUnit],
    measured: Sequence[Measured] | None = None,
    factors: Mapping[str, float] | None = None,
) -> None:
    """Turn errors into losses: divergence grows with the squared relative error of a weight's output, times a
    factor of its own (Malinovskii et al., arXiv 2411.17525, theorem 1).

    The factor comes from a sensitivity file, in which each group's divergence was ``measured``, and losses are nats;
    without one from ``factors`` by weight (``prior``), and losses are only comparable. With neither, all units are
    alike. CheckpointError if the file does not cover a unit.
    """
    for unit in units:
        if measured is not None:
            factor = _factor(unit, measured)
        else:
            factor = float(np.mean([(factors or {}).get(w.name, 1.0) for w in unit.weights]))
        for choice in unit.choices:
            choice.loss = factor * choice.error


@dataclass
class Measured:
    """A group of a sensitivity file: mean divergence (nats) with ``weights`` in ``format``."""

    weights: frozenset[str]
    format: str
    kl: float


def measured_groups(path: str | Path) -> list[Measured]:
    """The groups of a sensitivity file, without the one of the whole recipe; those of an interrupted run as well."""
    content = read_sensitivity(path)
    return [
        Measured(frozenset(group["weights"]), group["format"], float(group["kl"]["mean"]))
        for group in content["groups"]
        if group["group"] != ALL
    ]


def _factor(unit: AllocationUnit, measured: Sequence[Measured]) -> float:
    """Divergence per relative error, from the groups that hold the unit's weights."""
    names = {w.name for w in unit.weights}
    total = 0.0
    formats = set()
    for group in measured:
        shared = names & group.weights
        if shared:
            # a group of several units is divided evenly among its weights
            total += group.kl * len(shared) / len(group.weights)
            names -= shared
            formats.add(group.format)
    if names:
        more = f" and {len(names) - 1} more of {unit.name}" if len(names) > 1 else ""
        raise CheckpointError(
            f"the sensitivities say nothing of {sorted(names)[0]}{more}; measure them with a recipe that quantizes it, "
            "or run an interrupted `halfbyte sensitivity` again, which continues"
        )
    if len(formats) > 1 or MIXED in formats:
        raise CheckpointError(
            f"the sensitivities of {unit.name} were measured in several formats at once; measure them by group, or "
            "with a recipe that has one format"
        )
    error = unit.errors[formats.pop()]
    return max(total, 0.0) / error if error else 0.0
