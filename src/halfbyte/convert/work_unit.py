"""One unit of a plan becomes bytes of its file: read a slice, find its amax, encode, pack, write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from halfbyte.calibration.rounded import is_rounded, objective_of, read_rounded
from halfbyte.checkpoint import nbytes, numpy_dtype
from halfbyte.convert.calibrated_error import count_calibrated_error
from halfbyte.convert.encode_slice import (
    Context,
    encode_slice,
    importance_of,
    known_of,
    not_finite,
    read_slice,
    read_values,
)
from halfbyte.convert.given_tensors import GivenSlices
from halfbyte.convert.global_scale_fit import shared_scale
from halfbyte.convert.pipeline import Stages, Task
from halfbyte.convert.transcoder import Transcoder
from halfbyte.dialects import OutputChunk, OutputTensor
from halfbyte.errors import UnconvertibleError
from halfbyte.formats import QuantizedTensor
from halfbyte.kernels import ErrorStats, compare
from halfbyte.kernels import amax as largest
from halfbyte.kernels.tensor_error import TensorError
from halfbyte.plan.resources import cuts, item_bytes, shares_amax, whole_rows
from halfbyte.plan.shards import Item
from halfbyte.source.checkpoint import FLOATS
from halfbyte.source.smoothing import resmoothed


class Writer(Protocol):
    """Takes the bytes of a planned file: ``ShardWriter``, or what compares them."""

    def write_at(self, offset: int, buffer: Any) -> None:
        """Take bytes, or the bytes of an array, for an absolute offset."""


class WorkUnit:
    """Items that stay together, since engines fuse them: all that becomes of them, and the errors measured.

    ``bytes`` are those of the source. ``small``: the whole unit is no larger than a slice. ``resident``: it is
    larger, has one amax, and stays in memory until it is encoded.
    """

    def __init__(self, common: Context, items: Sequence[Item], writer: Writer) -> None:
        self.plan, self.reader, self.smoothings = common.plan, common.reader, common.smoothings
        self.report, self.limits, self._common = common.report, common.limits, common
        self.items = items
        self.writer = writer
        self.bytes = sum(map(item_bytes, items))
        self.small = self.bytes <= self.limits.slice_bytes
        self._chosen = [item for item in items if item.format is not None]
        use = self.plan.calibration_use
        self._statistics = use.calibration.statistics if use else None
        # engines fuse them, so all members of a unit were rounded together
        self._rounded = bool(self._chosen) and all(is_rounded(self._statistics, i.weight.name) for i in self._chosen)
        self._together = bool(self._chosen) and shares_amax(self._chosen)
        self._holds = self._together and (self.small or self.bytes <= self.limits.resident_bytes)
        self.resident = self._holds and not self.small
        self._held: dict[tuple[int, int], NDArray[Any]] = {}
        self._amax: dict[tuple[int, int], NDArray[np.float32]] = {}
        self._shared: NDArray[np.float32] | None = None
        self._fitted: NDArray[np.float32] | None = None
        given, inverse = common.given, common.plan.dialect.spelling.global_scale_inv
        self._carrier: Transcoder | GivenSlices | None = given.carrier(self._chosen, inverse) if given else None
        self._given = self._carrier is not None
        self._errors: dict[tuple[int, int], TensorError] = {}

    @property
    def errors(self) -> list[TensorError]:
        """One for every quantized item, its slices counted in their order."""
        compared = [self._error(item) for item in self._chosen]
        for (k, _), part in sorted(self._errors.items(), key=lambda entry: entry[0]):
            compared[k].merge(part)
        return compared

    def judged_errors(self) -> list[TensorError]:
        """The errors, once all of them are measured; UnconvertibleError for one beyond the bound.

        What was trained may be anywhere.
        """
        errors = self.errors
        if self._given:
            return errors
        for item, error in zip(self._chosen, errors, strict=True):
            self._common.refusals.judge(error, item.method)
        return errors

    def run(self) -> None:
        """All of the unit in this thread."""
        for stage in self.stages():
            for task in stage:
                task()

    def stages(self) -> Stages:
        """The work in lists of tasks; those of one list may run side by side."""
        others = list(chain.from_iterable(self._unquantized(item) for item in self.items if item.format is None))
        if not self._chosen:
            yield others
            return
        pieces = [(k, *cut) for k, item in enumerate(self._chosen) for cut in self._cuts(item)]
        if not self._given and any(item.action == "transcode" for item in self._chosen):
            yield [partial(self._prepare, pieces)]
        if self._together and not self._rounded and not (self._carrier and self._carrier.ready):
            yield [partial(self._look, *piece) for piece in pieces]
            self._shared = np.max(list(self._amax.values()))
            if self._chosen[0].fitted:
                self._fitted = yield from shared_scale(
                    self._chosen, pieces, self._shared, self.plan.dialect.spelling.global_scale_inv, self._values
                )
        places = [dict(zip([o.name for o in i.outputs], i.offsets, strict=True)) for i in self._chosen]
        yield [*others, *(partial(self._convert, *piece, places[piece[0]]) for piece in pieces)]

    def _cuts(self, item: Item) -> list[tuple[int, int]]:
        return cuts(item, whole_rows(item.format), self.limits.slice_bytes)

    def _unquantized(self, item: Item) -> Iterator[Task]:
        places = dict(zip([o.name for o in item.outputs], item.offsets, strict=True))
        if item.action == "calibrate":
            yield partial(self._state, item)
        elif item.action != "keep":
            yield partial(self._respell, item)
        elif item.outputs[0].part != "copy":
            for a, b in self._cuts(item):
                yield partial(self._spell, item, a, b, places)
        elif item.weight.name in self.smoothings:
            yield partial(self._resmooth, item, places)
        else:
            yield from self._copies(item)

    def _copies(self, item: Item) -> Iterator[Task]:
        """Tasks of about a slice's size: parts of large tensors, many small tensors together."""
        size, limit = 0, self.limits.slice_bytes
        some: list[tuple[OutputTensor, int, int, int]] = []
        for output, offset in zip(item.outputs, item.offsets, strict=True):
            total = nbytes(output.dtype, output.shape)
            for start in range(0, total, limit):
                count = min(limit, total - start)
                if some and size + count > limit:
                    yield partial(self._copy, item, some)
                    some, size = [], 0
                some.append((output, start, count, offset + start))
                size += count
        yield partial(self._copy, item, some, True)

    def _copy(self, item: Item, some: Sequence[tuple[OutputTensor, int, int, int]], last: bool = False) -> None:
        for output, start, count, offset in some:
            chunk = self.reader.chunk(output.name, start, count)
            if output.dtype in FLOATS and not largest(np.frombuffer(chunk, dtype=numpy_dtype(output.dtype)))[1]:
                raise not_finite(item.weight.name)
            if output.name.endswith(self.plan.dialect.activations.endings):
                _reciprocal(output.name, np.frombuffer(chunk, dtype=numpy_dtype(output.dtype)))
            self.writer.write_at(offset, chunk)
        self.report(item_bytes(item) if last else 0)

    def _state(self, item: Item) -> None:
        """What the plan knows already."""
        for output, offset in zip(item.outputs, item.offsets, strict=True):
            self.writer.write_at(offset, np.array(output.constant, numpy_dtype(output.dtype)).reshape(output.shape))
        self.report(item_bytes(item))

    def _respell(self, item: Item) -> None:
        """Write a scale of activations as the dialect stores it."""
        scale = self.reader.read(item.weight.sources[0]).astype(np.float32)
        reciprocal = _reciprocal(item.weight.sources[0], scale)
        value = reciprocal if item.outputs[0].part == "reciprocal" else scale
        value = value.astype(numpy_dtype(item.outputs[0].dtype), copy=False)
        self.writer.write_at(item.offsets[0], np.ascontiguousarray(value))
        self.report(item_bytes(item))

    def _resmooth(self, item: Item, places: Mapping[str, int]) -> None:
        """A kept weight that smoothing changes."""
        smoothing, size = self.smoothings[item.weight.name], self.limits.slice_bytes
        checkpoint = self.plan.checkpoint
        for name, first, part in resmoothed(checkpoint, self.reader, item.weight, smoothing, size, set(places)):
            if not largest(part)[1]:
                raise not_finite(item.weight.name)
            self.writer.write_at(places[name] + first * (part.nbytes // len(part)), part)
        self.report(item_bytes(item))

    def _spell(self, item: Item, first: int, stop: int, places: Mapping[str, int]) -> None:
        """Part of a kept weight that the dialect stores in another type, order or tensor."""
        values = read_values(self.plan, self.reader, item, first, stop)[0]
        if item.weight.name in self.smoothings:
            values = self.smoothings[item.weight.name].apply_rounded(values, first)
        self._write(self.plan.dialect.unquantized.write(item.outputs, values, first), places)
        self._report(item, first, stop)

    def _prepare(self, pieces: Sequence[tuple[int, int, int]]) -> None:
        parts = [[(a, b) for k, a, b in pieces if k == n] for n in range(len(self._chosen))]
        self._carrier = Transcoder(self.plan, self._chosen, parts, self.reader)

    def _look(self, k: int, first: int, stop: int) -> None:
        """The amax of a slice that shares it with others."""
        try:
            array, self._amax[k, first] = read_slice(self._common, self._chosen[k], first, stop)
        except UnconvertibleError as refusal:
            self._common.refusals.take(refusal)
            self._amax[k, first] = np.float32(0)
            return
        if self._holds:
            self._held[k, first] = array

    def _values(self, k: int, first: int, stop: int) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """A slice and its importance, held or read again."""
        item, array = self._chosen[k], self._held.get((k, first))
        if array is None:
            array = read_slice(self._common, item, first, stop)[0]
        return array, importance_of(self._common, item, first, stop)

    def _convert(self, k: int, first: int, stop: int, places: Mapping[str, int]) -> None:
        item = self._chosen[k]
        fmt = item.format
        assert fmt is not None
        self._errors[k, first] = error = self._error(item, 0)
        stacked = len(item.weight.shape) > 2
        carrier = self._carrier
        for a, b, carried in carrier.slices(item, first, stop) if carrier else [(first, stop, None)]:
            if carried is None:
                try:
                    tensor = self._encoded(k, a, b, error)
                except UnconvertibleError as refusal:
                    self._common.refusals.take(refusal)
                    self._report(item, a, b)
                    continue
            else:
                tensor = carried.tensor
                if self._given and not error.source:
                    error.add(read_values(self.plan, self.reader, item, a, b)[0], tensor)
                elif not carried.exact:
                    error.carry(carried.before, tensor)
            where = (a, 0) if stacked else (0, a)
            self._write(self.plan.dialect.spelling.write(_outputs(item, a, b), fmt, tensor, *where), places)
            self._report(item, a, b)

    def _encoded(self, k: int, first: int, stop: int, error: TensorError) -> QuantizedTensor:
        item = self._chosen[k]
        if self._rounded:
            return self._stored(item, first, stop, error)
        array = self._held.pop((k, first), None)
        shared = self._shared
        if array is None:
            array, amax = read_slice(self._common, item, first, stop)
            shared = amax if shared is None else shared
        assert shared is not None
        stats = [ErrorStats() for _ in range(stop - first if array.ndim > 2 else 1)]
        known = known_of(self._common, item, first, stop)
        device = self._common.limits.device
        tensor = encode_slice(self.plan, item, array, shared, stats, known, self._fitted, device)
        if array.ndim > 2:
            for expert, one in enumerate(stats, first):
                error.count_expert(expert, one)
        else:
            error.count(stats[0])
        weighted = count_calibrated_error(self._common, item, first, stop, array, tensor)
        error.calibrated_error, error.calibrated_squares = weighted
        error.requantized += array.size if error.source else 0
        return tensor

    def _stored(self, item: Item, first: int, stop: int, error: TensorError) -> QuantizedTensor:
        """A slice that the calibration rounded, and its error against the source."""
        assert item.format is not None and self._statistics is not None
        name = item.weight.name
        tensor = read_rounded(self._statistics, name, item.format, item.weight.shape, first, stop)
        array, _ = read_values(self.plan, self.reader, item, first, stop)
        stack = array.ndim > 2
        for a in range(first, stop) if stack else [first]:
            b = a + 1 if stack else stop
            one, shape = ErrorStats(), item.weight.shape
            part = read_rounded(self._statistics, name, item.format, shape, a, b) if stack else tensor
            compare(part, np.ascontiguousarray(array[a - first : b - first]), one)
            if stack:
                error.count_expert(a, one)
            else:
                error.count(one)
        error.calibrated_error, error.calibrated_squares = objective_of(self._statistics, name, first, stop)
        error.requantized += array.size if error.source else 0
        return tensor

    def _write(self, parts: Iterator[OutputChunk], places: Mapping[str, int]) -> None:
        for part in parts:
            self.writer.write_at(places[part.output.name] + part.start * part.array.dtype.itemsize, part.array)

    def _report(self, item: Item, first: int, stop: int) -> None:
        self.report(item_bytes(item) * (stop - first) // len(item.indices))

    def _error(self, item: Item, elements: int | None = None) -> TensorError:
        weight, fmt = item.weight, item.format
        assert fmt is not None
        before = self.plan.checkpoint.formats.get(weight.name)
        count = item.parameters if elements is None else elements
        return TensorError(weight.name, weight.role, fmt.name, count, source=before.name if before else "")


def _outputs(item: Item, first: int, stop: int) -> Sequence[OutputTensor]:
    """The outputs that some leading indices touch: those of these experts, where each has its own."""
    if item.outputs[0].expert is None:
        return item.outputs
    each, begin = len(item.outputs) // len(item.indices), item.indices.start
    return item.outputs[(first - begin) * each : (stop - begin) * each]


def _reciprocal(name: str, scale: NDArray[Any]) -> NDArray[np.float32]:
    """Of a scale of activations, which is zero where calibration sent no token to an expert; engines divide by it."""
    with np.errstate(divide="ignore", over="ignore"):
        value = np.asarray(np.float32(1) / scale.astype(np.float32))
    if not (np.isfinite(scale) & (scale > 0) & np.isfinite(value)).all():
        raise UnconvertibleError(
            f"{name}, a scale of activations, is {scale.flat[0]:g} instead of a positive number; "
            "calibrate the source again, or drop such scales by a rule"
        )
    return value
