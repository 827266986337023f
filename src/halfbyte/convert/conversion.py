"""The plan becomes files: shard by shard, in slices, resumable, with the error of every tensor measured."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from halfbyte.checkpoint import Journal, ShardWriter, write_file_atomic
from halfbyte.checkpoint.identity import SourceIdentity
from halfbyte.checkpoint.lock import OutputLock, remove_leftovers
from halfbyte.convert.encode_slice import Context, Progress
from halfbyte.convert.given_tensors import GivenTensors
from halfbyte.convert.hessian_cache import Hessians
from halfbyte.convert.output_folder_state import (
    already_complete,
    continue_or_begin,
    discard,
    source_identity,
    with_what_stays,
)
from halfbyte.convert.pipeline import Pipeline, Stages
from halfbyte.convert.read_in_order import open_reader
from halfbyte.convert.refusals import Refusals
from halfbyte.convert.smoothing_search import SMOOTHING_BYTES, SmoothingReport, choose_smoothings, sample_bytes
from halfbyte.convert.work_unit import WorkUnit
from halfbyte.errors import HalfbyteError, OutputError, PlanError, UnconvertibleError
from halfbyte.kernels import backend, use_backend_here
from halfbyte.kernels.tensor_error import TensorError, calibrated_relmse
from halfbyte.plan.conversion_plan import CONFIG, PROVENANCE, Plan
from halfbyte.plan.resources import MEMORY, RESIDENT_UNITS, Limits, cores, item_bytes
from halfbyte.plan.sealed_provenance import Outcome
from halfbyte.plan.shards import Shard
from halfbyte.renamed import accepts_old_names

__all__ = ["Conversion", "Progress", "convert", "source_bytes"]

# files that are being written or made durable at the same time
OPEN_FILES = 3
# units that one task takes at most, so that progress is seen
SMALL_UNITS = 64
# where units of less take as much time in Python as in the kernels
TINY_BYTES = 1 << 17
_TINY_LOCK = threading.Lock()


Announce = Callable[[str], None]
"""Called with one line on what a conversion found in its output folder."""


@dataclass
class Conversion:
    """What a conversion did; ``smoothings``: what AWQ chose for every group that could be smoothed.

    ``already_complete``: there was nothing left to do, so nothing was done and no error measured.
    """

    out: Path
    errors: list[TensorError]
    seconds: float
    resumed_shards: int
    smoothings: list[SmoothingReport] = field(default_factory=list)
    already_complete: bool = False

    @property
    def relmse(self) -> float:
        """Squared error over sum of squares, all quantized weights together."""
        squares = sum(e.squares for e in self.errors)
        return sum(e.squared_error for e in self.errors) / squares if squares else 0.0

    @property
    def calibrated_relmse(self) -> float | None:
        """The same of outputs on the calibration text, over the weights that are calibrated; None without any."""
        return calibrated_relmse(self.errors)


def source_bytes(plan: Plan) -> int:
    """Bytes of the source tensors that a conversion reads: the total for a progress bar."""
    return sum(item_bytes(item) for shard in plan.shards for item in shard.items) + sample_bytes(plan)


@accepts_old_names(workers="threads")
def convert(
    plan: Plan,
    out: str | Path,
    threads: int | None = None,
    progress: Progress | None = None,
    memory: int | None = None,
    announce: Announce | None = None,
    collect_refused: bool = False,
    given: GivenTensors | None = None,
    device: str = "cpu",
) -> Conversion:
    """Write the plan's output to the folder ``out``, or continue there after an interruption.

    At most ``threads`` (default: one per core; fewer where ``memory``, by default 2 GiB, does not allow so many) work
    on slices of weights side by side, while finished files are made durable in the background. The bytes written
    depend on neither. ``announce`` is told at the beginning if an earlier run is continued. An output that is
    complete already is left alone. Raises OutputError for an unusable folder, one that another process writes, or a
    full disk, CheckpointError for a source that cannot be read: what is finished stays then, and a rerun continues.
    UnconvertibleError is for a source that changes and for weights that are not finite or that their format cannot
    hold within the bound of ``verify``: a rerun would meet them again, so nothing stays. With ``collect_refused`` it
    is raised at the end and names all of these weights, else at the first one. ``given``: tensors that are written
    instead of what the source has; the plan's origin must name them, since they decide the bytes.
    ``device``: "cuda" encodes on a GPU what has a kernel there; it decides no byte either.
    """
    began = time.monotonic()
    inventory = plan.checkpoint.inventory
    if inventory.root is None and inventory.remote is None:
        raise PlanError(f"{inventory.source} is an inventory without weights; give the checkpoint itself")
    out = Path(out).expanduser()
    existed = out.exists()
    source = source_identity(plan)
    if already_complete(plan, out, source):
        return Conversion(out, [], time.monotonic() - began, len(plan.shards), already_complete=True)
    limits, refusals = Limits(threads or cores(), memory or MEMORY, device), Refusals(collect_refused)
    try:
        with OutputLock(out):
            journal = continue_or_begin(plan, out, source, announce or (lambda _: None))
            try:
                done = _convert(plan, out, journal, source, limits, progress, refusals, given)
            except UnconvertibleError:
                discard(plan, out)
                raise
            except HalfbyteError as error:
                raise with_what_stays(plan, out, journal, error) from error
            journal.finish()
    except HalfbyteError:
        if not existed:
            with suppress(OSError):  # something is finished, and stays
                out.rmdir()
        raise
    done.seconds = time.monotonic() - began
    return done


def _convert(
    plan: Plan,
    out: Path,
    journal: Journal,
    source: SourceIdentity,
    limits: Limits,
    progress: Progress | None,
    refusals: Refusals,
    given: GivenTensors | None,
) -> Conversion:
    """All files that the journal does not hold yet."""
    todo = [shard for shard in plan.shards if shard.name not in journal.done]
    report = progress or (lambda _: None)
    for shard in plan.shards:
        if shard.name in journal.done:
            report(sum(map(item_bytes, shard.items)))
    chosen = write_files(plan, out, journal, source, todo, limits, report, refusals, given)
    errors = complete_output(plan, out, journal, source)
    return Conversion(out, errors, 0.0, len(plan.shards) - len(todo), chosen)


def write_files(
    plan: Plan,
    out: Path,
    journal: Journal,
    source: SourceIdentity,
    todo: Sequence[Shard],
    limits: Limits,
    report: Progress,
    refusals: Refusals,
    given: GivenTensors | None = None,
) -> list[SmoothingReport]:
    """Write some of the plan's files and note them in the journal; returns what was chosen for smoothing."""
    _check_disk(plan, out, todo)
    count = plan.resources(limits).threads
    with given.reader(plan.checkpoint.inventory) if given else open_reader(plan, todo, limits) as reader:
        with ThreadPoolExecutor(
            min(count, max(1, limits.memory // SMOOTHING_BYTES)), "halfbyte-smoothing", use_backend_here, (backend(),)
        ) as pool:
            smoothings, chosen = choose_smoothings(plan, out, journal, reader, pool, report)
        known = plan.calibration_use.calibration if plan.calibration_use else None
        hessians = Hessians(known, limits.memory // 8) if known and known.statistics else None
        context = Context(plan, reader, smoothings, report, limits, hessians, refusals, given)
        _write_shards(context, count, todo, out, journal, source)
    refusals.check()
    return chosen


def complete_output(plan: Plan, out: Path, journal: Journal, source: SourceIdentity) -> list[TensorError]:
    """Write everything beside the weight files, which are all finished; returns the errors of all weights."""
    errors: dict[str, TensorError] = {}
    for shard in plan.shards:
        for error in (TensorError(**e) for e in journal.done[shard.name]["errors"]):
            if errors.setdefault(error.name, error) is not error:
                errors[error.name].merge(error)
    _finish(plan, out, journal, source, errors.values())
    return list(errors.values())


class _OpenShard:
    """A file that is being written: the errors of its jobs, in order, and how many of them are still to end."""

    def __init__(self, shard: Shard, out: Path, attempt: str) -> None:
        self.shard = shard
        self.writer = ShardWriter(out / shard.name, shard.layout, attempt)
        self.errors: list[list[TensorError]] = []
        # one more until all of them are known
        self.left = 1

    def units(self, context: Context) -> Iterator[WorkUnit]:
        """The units, each made when it is asked for."""
        return (WorkUnit(context, items, self.writer) for items in self.shard.units)

    def commit(self, journal: Journal, source: SourceIdentity) -> None:
        """Make the file durable and note that it is finished, unless the source changed while it was written."""
        sha256 = self.writer.commit()
        source.check()
        errors = [vars(error) for job in self.errors for error in job]
        journal.record(self.shard.name, self.shard.layout.total, {"sha256": sha256, "errors": errors})


def _write_shards(
    context: Context, threads: int, todo: Sequence[Shard], out: Path, journal: Journal, source: SourceIdentity
) -> None:
    """All files, one after the other: while one is made durable, the next one is written already."""
    opened: list[_OpenShard] = []
    resident: list[WorkUnit] = []
    lock = threading.Lock()
    try:
        with Pipeline(threads) as pipeline:

            def commit(file: _OpenShard) -> None:
                if context.refusals.weights:
                    file.writer.abort()
                else:
                    file.commit(journal, source)
                opened.remove(file)

            def ended(file: _OpenShard, units: Sequence[WorkUnit], errors: list[TensorError]) -> None:
                for unit in units:
                    errors += unit.judged_errors()
                    if unit.resident:
                        resident.remove(unit)
                with lock:
                    file.left -= 1
                    last = not file.left
                if last:
                    pipeline.later(partial(commit, file))

            for shard in todo:
                pipeline.wait(lambda: len(opened) < OPEN_FILES)
                file = _OpenShard(shard, out, journal.attempt)
                opened.append(file)
                for units in _jobs(file.units(context), context.limits.slice_bytes):
                    if units[0].resident:
                        pipeline.wait(lambda: len(resident) < RESIDENT_UNITS)
                        resident.append(units[0])
                    file.errors.append([])
                    with lock:
                        file.left += 1
                    pipeline.add(_stages(units), partial(ended, file, units, file.errors[-1]))
                ended(file, [], [])
            pipeline.finish()
    finally:
        for file in opened:
            file.writer.abort()
        # an interrupt may fall between the making of a file and its place in the list
        remove_leftovers(out, [shard.name for shard in todo], journal.attempt)


def _jobs(units: Iterable[WorkUnit], limit: int) -> Iterator[list[WorkUnit]]:
    """Units one by one, small ones together up to a slice's size."""
    some: list[WorkUnit] = []
    size = 0
    for unit in units:
        if some and (not unit.small or size + unit.bytes > limit or len(some) == SMALL_UNITS):
            yield some
            some, size = [], 0
        if unit.small:
            some.append(unit)
            size += unit.bytes
        else:
            yield [unit]
    if some:
        yield some


def _stages(units: Sequence[WorkUnit]) -> Stages:
    if not units[0].small:
        return units[0].stages()
    # threads that only pass Python's lock to and fro are slower than one
    alone = _TINY_LOCK if sum(unit.bytes for unit in units) < TINY_BYTES * len(units) else nullcontext()

    def run() -> None:
        with alone:
            for unit in units:
                unit.run()

    return iter([[run]])


def _check_disk(plan: Plan, out: Path, todo: Sequence[Shard]) -> None:
    rest = plan.repository_bytes - plan.shard_bytes + sum(shard.layout.total for shard in todo)
    free = shutil.disk_usage(out).free
    if free < rest:
        raise OutputError(
            f"{out} needs {rest} more bytes, but the disk has {free} free; free some space or choose another disk"
        )


def _finish(plan: Plan, out: Path, journal: Journal, source: SourceIdentity, errors: Iterable[TensorError]) -> None:
    """Side files, then index and halfbyte.json, then config.json: a folder with a config is complete."""
    store = plan.checkpoint.inventory.store
    hashes = {name: entry["sha256"] for name, entry in journal.done.items()}
    for name in plan.side_files:
        hashes[name] = store.copy(name, out / name)
    source.check()
    written = plan.written
    hashes |= {name: hashlib.sha256(content).hexdigest() for name, content in written.items()}
    last = written.pop(CONFIG, None)
    weighted = {error.name: (error.calibrated_error, error.calibrated_squares) for error in errors}
    sealed = plan.sealed_provenance(Outcome(hashes, source.digest(plan.checkpoint.inventory.files), weighted))
    for name, content in [*written.items(), (PROVENANCE, sealed)]:
        write_file_atomic(out / name, content)
    if last is not None:
        write_file_atomic(out / CONFIG, last)
