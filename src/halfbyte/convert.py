"""The plan becomes files: shard by shard, in slices, resumable, with the error of every tensor measured."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from halfbyte.checkpoint import (
    Journal,
    Reader,
    ShardWriter,
    copy_file_atomic,
    prepare_output,
    write_file_atomic,
)
from halfbyte.errors import OutputError, PlanError
from halfbyte.fold_search import FoldReport, sample_bytes, settle_folds
from halfbyte.measure import TensorError
from halfbyte.plan import CONFIG, INDEX, PROVENANCE, Plan
from halfbyte.shards import Shard
from halfbyte.units import Folds, Progress, item_bytes, write_unit

__all__ = ["Conversion", "Progress", "convert", "source_bytes"]


@dataclass
class Conversion:
    """What a conversion did; ``folds``: what AWQ chose for every group that could be folded."""

    out: Path
    errors: list[TensorError]
    seconds: float
    resumed_shards: int
    folds: list[FoldReport] = field(default_factory=list)

    @property
    def relmse(self) -> float:
        """Squared error over sum of squares, all quantized weights together."""
        squares = sum(e.squares for e in self.errors)
        return sum(e.squared_error for e in self.errors) / squares if squares else 0.0


def source_bytes(plan: Plan) -> int:
    """Bytes of the source tensors that a conversion reads: the total for a progress bar."""
    return sum(item_bytes(item) for shard in plan.shards for item in shard.items) + sample_bytes(plan)


def convert(plan: Plan, out: str | Path, workers: int | None = None, progress: Progress | None = None) -> Conversion:
    """Write the plan's output to the folder ``out``, or continue there after an interruption.

    ``workers`` threads (default: one per core) encode units side by side; the bytes do not depend on it.
    Raises OutputError for an unusable folder or a full disk, CheckpointError for a damaged source.
    """
    began = time.monotonic()
    inventory = plan.checkpoint.inventory
    if inventory.root is None:
        raise PlanError(f"{inventory.source} is an inventory without weights; give the checkpoint itself")
    out = Path(out)
    journal = prepare_output(out, inventory.root, plan.fingerprint)
    todo = [shard for shard in plan.shards if shard.name not in journal.done]
    _check_disk(plan, out, todo)
    report = progress or (lambda _: None)
    for shard in plan.shards:
        if shard.name in journal.done:
            report(sum(map(item_bytes, shard.items)))
    with Reader(inventory) as reader, ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        folds, chosen = settle_folds(plan, out, journal, reader, pool, report)
        for shard in todo:
            _write_shard(plan, shard, out, reader, journal, pool, report, folds)
    _finish(plan, out, inventory.root)
    errors: dict[str, TensorError] = {}
    for shard in plan.shards:
        for error in (TensorError(**e) for e in journal.done[shard.name]["errors"]):
            if errors.setdefault(error.name, error) is not error:
                errors[error.name].merge(error)
    journal.finish()
    return Conversion(out, list(errors.values()), time.monotonic() - began, len(plan.shards) - len(todo), chosen)


def _write_shard(
    plan: Plan,
    shard: Shard,
    out: Path,
    reader: Reader,
    journal: Journal,
    pool: ThreadPoolExecutor,
    report: Progress,
    folds: Folds,
) -> None:
    with ShardWriter(out / shard.name, shard.layout) as writer:
        jobs = [pool.submit(write_unit, plan, unit, reader, writer, report, folds) for unit in shard.units]
        try:
            errors = [error for job in jobs for error in job.result()]
        except BaseException:
            for job in jobs:
                job.cancel()
            for job in jobs:
                if not job.cancelled():
                    job.exception()  # let running units end before the file is closed
            raise
        writer.commit()
    journal.record(shard.name, shard.layout.total, {"errors": [asdict(e) for e in errors]})


def _check_disk(plan: Plan, out: Path, todo: Sequence[Shard]) -> None:
    rest = plan.repository_bytes - plan.shard_bytes + sum(shard.layout.total for shard in todo)
    free = shutil.disk_usage(out).free
    if free < rest:
        raise OutputError(
            f"{out} needs {rest} more bytes, but the disk has {free} free; free some space or choose another disk"
        )


def _finish(plan: Plan, out: Path, root: Path) -> None:
    """Side files, then index, then config.json: a folder with a config is complete."""
    for name in plan.side_files:
        copy_file_atomic(root / name, out / name)
    for name, content in _written(plan):
        write_file_atomic(out / name, content)


def _written(plan: Plan) -> Iterator[tuple[str, bytes]]:
    yield from plan.extra_files.items()
    if plan.index is not None:
        yield INDEX, plan.index
    yield PROVENANCE, plan.provenance
    if plan.config is not None:
        yield CONFIG, plan.config
