"""Which scale every group of weights is smoothed by: chosen on a sample, with the plan's own formats and searches."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.checkpoint import Journal, Reader, ShardWriter, nbytes
from halfbyte.models.smoothing_groups import SmoothingGroup
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.shards import Item
from halfbyte.search.awq import Consumer, SmoothingChoice, choose_scale, shared
from halfbyte.source.smoothing import SMOOTHING_FILE, Smoothing, layout, make_smoothings, read_scales

SAMPLE = 1 << 20
"""Elements of a weight that the exponent is chosen on."""
SMOOTHING_BYTES = 128 << 20
"""Memory that the choice for one group takes at most."""
_RUNS = 16


@dataclass
class SmoothingReport:
    """What was chosen for a group: the exponent, and the weighted error with it and without smoothing.

    ``rounding``: by weight that stays unquantized, the relative weighted error of rounding it again.
    """

    group: str
    alpha: float
    loss: float
    unfolded: float
    rounding: dict[str, float] = field(default_factory=dict)


def sample_bytes(plan: Plan) -> int:
    """Source bytes that the choice of scales deals with, once for every exponent tried."""
    items = {item.weight.name: item for item in plan.items}
    return sum(
        _sample_bytes(items[w.name]) for g in plan.smoothings for w in g.consumers if items[w.name].action != "drop"
    )


def choose_smoothings(
    plan: Plan, out: Path, journal: Journal, reader: Reader, pool: Executor, report: Callable[[int], None]
) -> tuple[dict[str, Smoothing], list[SmoothingReport]]:
    """Choose the scales and write them to ``out``, or take over those that an interrupted run has written.

    Returns what they make of every weight, and the report of every group.
    """
    if not plan.smoothings:
        return {}, []
    if SMOOTHING_FILE in journal.done:
        report(sample_bytes(plan))
    else:
        _choose_all(plan, out, journal, reader, pool, report)
    reports = [SmoothingReport(**entry) for entry in journal.done[SMOOTHING_FILE]["folds"]]
    return make_smoothings(plan.checkpoint, reader, plan.smoothings, read_scales(out / SMOOTHING_FILE)), reports


def _choose_all(
    plan: Plan, out: Path, journal: Journal, reader: Reader, pool: Executor, report: Callable[[int], None]
) -> None:
    planned = layout(plan.smoothings)
    entries: list[dict[str, Any]] = []
    with ShardWriter(out / SMOOTHING_FILE, planned, journal.attempt) as writer:
        items = {item.weight.name: item for item in plan.items}
        jobs = [pool.submit(_choose, plan, group, items, reader, report) for group in plan.smoothings]
        try:
            for job, group, offset in zip(jobs, plan.smoothings, planned.offsets, strict=True):
                choice = job.result()
                shape = (group.channels,) if group.experts is None else (group.experts, group.channels)
                scale = np.float32(1) if choice.asked is None else choice.asked
                # importance that is the same for all experts makes one scale for all
                writer.write_at(offset, np.ascontiguousarray(np.broadcast_to(scale, shape)))
                entries.append(
                    {
                        "group": group.name,
                        "alpha": choice.alpha,
                        "loss": choice.loss,
                        "unfolded": choice.unfolded,
                        "rounding": choice.rounding,
                    }
                )
        except BaseException:
            for job in jobs:
                job.cancel()
            for job in jobs:
                if not job.cancelled():
                    job.exception()  # let what is running end before files are closed
            raise
        sha256 = writer.commit()
    journal.record(SMOOTHING_FILE, planned.total, {"sha256": sha256, "folds": entries})


def _choose(
    plan: Plan, group: SmoothingGroup, items: dict[str, Item], reader: Reader, report: Callable[[int], None]
) -> SmoothingChoice:
    assert plan.calibration_use is not None
    matched = plan.calibration_use.calibration.matched
    first = group.producers[0]
    norm = None if first.kind == "rows" else plan.checkpoint.read(reader, first.weight)
    members = [items[w.name] for w in group.consumers if items[w.name].action != "drop"]
    entries = [(matched.values.get(i.weight.name), matched.counts.get(i.weight.name)) for i in members]
    per_expert = group.experts is not None
    choice = choose_scale(
        [_consumer(plan, item, reader) for item in members],
        norm,
        zero_centred=first.kind == "zero_centred",
        per_expert=per_expert,
        importance=shared(entries, per_expert),
    )
    report(sum(map(_sample_bytes, members)))
    return choice


def _consumer(plan: Plan, item: Item, reader: Reader) -> Consumer:
    """A weight, or a sample of its experts and rows spread evenly over it."""
    assert plan.calibration_use is not None
    matched, weight = plan.calibration_use.calibration.matched, item.weight
    importance, counts = matched.values.get(weight.name), matched.counts.get(weight.name)
    sample = Consumer(
        weight.name,
        np.empty(0),
        importance,
        item.format,
        item.search or "sweep",
        share=None if len(weight.shape) > 2 else weight.group,
        weighted=item.weighted,
    )
    columns, tile = weight.shape[-1], max(item.format.block[0] if item.format else 1, 1)
    if len(weight.shape) == 2:
        parts = [plan.checkpoint.read(reader, weight, a, b) for a, b in _runs(weight.shape[0], SAMPLE // columns, tile)]
        return replace(sample, weight=np.concatenate(parts))
    count, rows = weight.shape[0], weight.shape[1]
    chosen = np.unique(np.linspace(0, count - 1, min(count, _RUNS)).astype(np.int64))
    runs = _runs(rows, SAMPLE // columns // len(chosen), tile)
    stack: list[NDArray[Any]] = []
    for expert in chosen:
        whole = plan.checkpoint.read(reader, weight, int(expert), int(expert) + 1)
        stack.append(np.concatenate([whole[:, a:b] for a, b in runs], axis=1))
    if importance is not None and importance.ndim > 1:
        importance = importance[chosen]
    if counts is not None:
        counts = counts[chosen] if counts.ndim else None
    return replace(sample, weight=np.concatenate(stack), importance=importance, counts=counts, experts=chosen)


def _runs(rows: int, wanted: int, tile: int) -> list[tuple[int, int]]:
    """Up to 16 runs of rows, whole tiles, that are spread evenly and hold about ``wanted`` rows."""
    if rows <= max(wanted, tile):
        return [(0, rows)]
    count = max(1, min(_RUNS, wanted // tile))
    length = max(wanted // count // tile, 1) * tile
    starts = (np.linspace(0, rows - length, count) // tile).astype(int) * tile
    return [(int(start), int(start) + length) for start in starts]


def _sample_bytes(item: Item) -> int:
    return nbytes(item.weight.dtype, (min(item.parameters, SAMPLE),))
