"""The plan becomes files: shard by shard, in slices, resumable, with the error of every tensor measured."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.carry import Carrier
from halfbyte.checkpoint import (
    Journal,
    Reader,
    ShardWriter,
    copy_file_atomic,
    nbytes,
    numpy_dtype,
    prepare_output,
    write_file_atomic,
)
from halfbyte.errors import CheckpointError, FormatError, OutputError, PlanError
from halfbyte.formats import BlockFormat, Format, QuantizedTensor
from halfbyte.kernels import ErrorStats
from halfbyte.kernels import amax as largest
from halfbyte.measure import TensorError
from halfbyte.plan import CONFIG, INDEX, PROVENANCE, Plan
from halfbyte.search import encode, get_search, tensor_scale
from halfbyte.shards import Item, Shard
from halfbyte.view import FLOATS

SLICE_BYTES = 8 << 20
Progress = Callable[[int], None]
"""Called with the number of source bytes that have just been dealt with."""


@dataclass
class Conversion:
    """What a conversion did."""

    out: Path
    errors: list[TensorError]
    seconds: float
    resumed_shards: int

    @property
    def relmse(self) -> float:
        """Squared error over sum of squares, all quantized weights together."""
        squares = sum(e.squares for e in self.errors)
        return sum(e.squared_error for e in self.errors) / squares if squares else 0.0


def source_bytes(plan: Plan) -> int:
    """Bytes of the source tensors that a conversion reads: the total for a progress bar."""
    return sum(_source_bytes(item) for shard in plan.shards for item in shard.items)


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
            report(sum(map(_source_bytes, shard.items)))
    with Reader(inventory) as reader, ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for shard in todo:
            _write_shard(plan, shard, out, reader, journal, pool, report)
    _finish(plan, out, inventory.root)
    errors: dict[str, TensorError] = {}
    for shard in plan.shards:
        for error in (TensorError(**e) for e in journal.done[shard.name]["errors"]):
            if errors.setdefault(error.name, error) is not error:
                errors[error.name].merge(error)
    journal.finish()
    return Conversion(out, list(errors.values()), time.monotonic() - began, len(plan.shards) - len(todo))


def _write_shard(
    plan: Plan, shard: Shard, out: Path, reader: Reader, journal: Journal, pool: ThreadPoolExecutor, report: Progress
) -> None:
    with ShardWriter(out / shard.name, shard.layout) as writer:
        jobs = [pool.submit(_unit, plan, unit, reader, writer, report) for unit in shard.units]
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


def _unit(plan: Plan, unit: list[Item], reader: Reader, writer: ShardWriter, report: Progress) -> list[TensorError]:
    for item in (item for item in unit if item.format is None):
        (_copy if item.action == "keep" else _respell)(item, reader, writer)
        report(_source_bytes(item))
    chosen = [item for item in unit if item.format is not None]
    return _quantize(plan, chosen, reader, writer, report) if chosen else []


def _respell(item: Item, reader: Reader, writer: ShardWriter) -> None:
    """A scale of activations."""
    scale = reader.read(item.weight.sources[0]).astype(np.float32)
    value = np.float32(1) / scale if item.outputs[0].part == "reciprocal" else scale
    if not (np.isfinite(value) & (value > 0)).all():
        raise _not_finite(item.weight.sources[0])
    writer.write_at(item.offsets[0], np.ascontiguousarray(value))


def _copy(item: Item, reader: Reader, writer: ShardWriter) -> None:
    for output, offset in zip(item.outputs, item.offsets, strict=True):
        for chunk in reader.chunks(output.name, SLICE_BYTES):
            if output.dtype in FLOATS and not largest(np.frombuffer(chunk, dtype=numpy_dtype(output.dtype)))[1]:
                raise _not_finite(item.weight.name)
            writer.write_at(offset, chunk)
            offset += len(chunk)


def _quantize(plan: Plan, unit: list[Item], reader: Reader, writer: ShardWriter, report: Progress) -> list[TensorError]:
    """Weights that share a tensor scale: read a slice of each, find their amax, encode, write."""
    fmt = unit[0].format
    assert fmt is not None
    formats = plan.checkpoint.formats
    errors = [
        TensorError(w.name, w.role, fmt.name, i.parameters, source=formats[w.name].name if w.name in formats else "")
        for i in unit
        for w in (i.weight,)
    ]
    stacked = len(unit[0].weight.shape) > 2
    cuts = [_cuts(item, fmt, len(unit)) for item in unit]
    # matrices share one amax; each expert of a stack has its own, so a slice of experts is complete in itself
    amax = None
    held: dict[int, NDArray[Any]] = {}
    carrier = Carrier(plan, unit, cuts, reader)
    if not stacked and _needs_amax(fmt) and not carrier.ready:
        amax = np.float32(0)
        for k, item in enumerate(unit):
            for first, stop in cuts[k]:
                array, found = _read(plan, reader, item, first, stop)
                amax = np.maximum(amax, found)
                if len(cuts[k]) == 1:
                    held[k] = array
    for k, item in enumerate(unit):
        places = {output.name: offset for output, offset in zip(item.outputs, item.offsets, strict=True)}
        for first, stop, carried in (piece for cut in cuts[k] for piece in carrier.slices(item, *cut)):
            if carried is None:
                if k in held:
                    array, found = held.pop(k), np.float32(0)
                else:
                    array, found = _read(plan, reader, item, first, stop)
                stats = ErrorStats()
                tensor = _encode(plan, item, array, found if amax is None else amax, stats)
                errors[k].count(stats)
                errors[k].requantized += array.size if errors[k].source else 0
            else:
                tensor = carried.tensor
                if not carried.exact:
                    errors[k].carry(carried.before, tensor)
            where = (first, 0) if stacked else (0, first)
            for part in plan.dialect.write(item.outputs, fmt, tensor, *where):
                start = part.start * part.array.dtype.itemsize
                writer.write_at(places[part.output.name] + start, part.array)
            report(_source_bytes(item) * (stop - first) // len(item.indices))
    return errors


def _encode(
    plan: Plan, item: Item, array: NDArray[Any], amax: NDArray[np.float32], stats: ErrorStats
) -> QuantizedTensor:
    fmt = item.format
    assert fmt is not None
    try:
        if not (isinstance(fmt, BlockFormat) and fmt.has_tensor_scale):
            return encode(array, fmt, item.search, amax=amax, stats=stats)
        scale = tensor_scale(amax, fmt, get_search(item.search), item.power_of_two)
        if plan.dialect.divisor:
            return encode(array, fmt, item.search, divisor=np.float32(1) / scale, stats=stats)
        return encode(array, fmt, item.search, tensor_scale=scale, stats=stats)
    except FormatError as error:
        raise CheckpointError(f"{item.weight.name}: {error}") from error


def _needs_amax(fmt: Format) -> bool:
    return isinstance(fmt, BlockFormat) and (fmt.has_tensor_scale or fmt.block == (-1, -1))


def _read(plan: Plan, reader: Reader, item: Item, first: int, stop: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Part of a weight and the largest magnitude of each of its matrices."""
    array = plan.checkpoint.read(reader, item.weight, first, stop)
    if array.dtype.itemsize > 4:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    found, finite = largest(array)
    if not finite:
        raise _not_finite(item.weight.name)
    return array, found


def _cuts(item: Item, fmt: Format, members: int) -> list[tuple[int, int]]:
    """Ranges of leading indices (or of rows, for a matrix) that are worked on at a time."""
    weight, todo = item.weight, item.indices
    one = nbytes("BF16", weight.shape[1:])
    step = max(1, SLICE_BYTES // max(one * members, 1))
    if len(weight.shape) == 2:
        # rows of a tile and packed zero points stay together
        whole = max(fmt.block[0], 8)
        step = max(whole, step // whole * whole)
    return [(i, min(i + step, todo.stop)) for i in range(todo.start, todo.stop, step)]


def _source_bytes(item: Item) -> int:
    return nbytes(item.weight.dtype, (item.parameters,))


def _not_finite(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} holds a NaN, an infinity or a value beyond FP32; repair the source, or drop the tensor by a rule"
    )


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
    yield CONFIG, plan.config
