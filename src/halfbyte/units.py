"""One unit of a plan becomes bytes of its file: read a slice, find its amax, encode, pack, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.calibrate import Activations
from halfbyte.carry import Carrier
from halfbyte.checkpoint import Reader, ShardWriter, nbytes, numpy_dtype
from halfbyte.errors import CheckpointError, FormatError
from halfbyte.folding import Fold, refolded
from halfbyte.formats import BlockFormat, Format, QuantizedTensor
from halfbyte.kernels import ErrorStats
from halfbyte.kernels import amax as largest
from halfbyte.measure import TensorError
from halfbyte.plan import Plan
from halfbyte.search import encode, get_search, tensor_scale
from halfbyte.shards import Item
from halfbyte.view import FLOATS

SLICE_BYTES = 8 << 20
Folds = Mapping[str, Fold]
Progress = Callable[[int], None]
"""Called with the number of source bytes that have just been dealt with."""


def write_unit(
    plan: Plan, unit: list[Item], reader: Reader, writer: ShardWriter, report: Progress, folds: Folds
) -> list[TensorError]:
    """Write all items of a unit and measure what it quantized; ``folds`` by weight name."""
    for item in (item for item in unit if item.format is None):
        if item.weight.sources[0].endswith(plan.checkpoint.dialect.input_scales if plan.checkpoint.dialect else ()):
            _check_input_scale(item.weight.sources[0], reader)
        if item.action != "keep":
            _respell(item, reader, writer)
        elif item.outputs[0].part != "copy":
            _spell(plan, item, reader, writer, folds)
        elif item.weight.name in folds:
            _refold(plan, item, reader, writer, folds[item.weight.name])
        else:
            _copy(item, reader, writer)
        report(item_bytes(item))
    chosen = [item for item in unit if item.format is not None]
    return _quantize(plan, chosen, reader, writer, report, folds) if chosen else []


def _respell(item: Item, reader: Reader, writer: ShardWriter) -> None:
    """A scale of activations."""
    scale = reader.read(item.weight.sources[0]).astype(np.float32)
    value = np.float32(1) / scale if item.outputs[0].part == "reciprocal" else scale
    writer.write_at(item.offsets[0], np.ascontiguousarray(value))


def _check_input_scale(name: str, reader: Reader) -> None:
    """Engines divide by it. It is zero where calibration sent no token to an expert."""
    scale = reader.read(name).astype(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        if not (np.isfinite(scale) & (scale > 0) & np.isfinite(1 / scale)).all():
            raise CheckpointError(
                f"{name}, a scale of activations, is {scale.ravel()[0]:g} instead of a positive number; "
                "calibrate the source again, or drop these scales by a rule"
            )


def _copy(item: Item, reader: Reader, writer: ShardWriter) -> None:
    for output, offset in zip(item.outputs, item.offsets, strict=True):
        for chunk in reader.chunks(output.name, SLICE_BYTES):
            if output.dtype in FLOATS and not largest(np.frombuffer(chunk, dtype=numpy_dtype(output.dtype)))[1]:
                raise _not_finite(item.weight.name)
            writer.write_at(offset, chunk)
            offset += len(chunk)


def _refold(plan: Plan, item: Item, reader: Reader, writer: ShardWriter, fold: Fold) -> None:
    """A kept weight that something is folded into."""
    places = {output.name: offset for output, offset in zip(item.outputs, item.offsets, strict=True)}
    for name, first, part in refolded(plan.checkpoint, reader, item.weight, fold, SLICE_BYTES, set(places)):
        if not largest(part)[1]:
            raise _not_finite(item.weight.name)
        writer.write_at(places[name] + first * (part.nbytes // len(part)), part)


def _spell(plan: Plan, item: Item, reader: Reader, writer: ShardWriter, folds: Folds) -> None:
    """A kept weight that the dialect stores in another type, order or tensor."""
    places = {output.name: offset for output, offset in zip(item.outputs, item.offsets, strict=True)}
    for first, stop in _cuts(item, 1, 1):
        values = _read(plan, reader, item, first, stop, folds)[0]
        for part in plan.dialect.spell(item.outputs, values, first):
            writer.write_at(places[part.output.name] + part.start * part.array.dtype.itemsize, part.array)


def _quantize(
    plan: Plan, unit: list[Item], reader: Reader, writer: ShardWriter, report: Progress, folds: Folds
) -> list[TensorError]:
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
    cuts = [_cuts(item, max(fmt.block[0], 8), len(unit)) for item in unit]
    # matrices share one amax; each expert of a stack has its own, so a slice of experts is complete in itself
    amax = None
    held: dict[int, NDArray[Any]] = {}
    carrier = Carrier(plan, unit, cuts, reader)
    if not stacked and _needs_amax(fmt) and not carrier.ready:
        amax = np.float32(0)
        for k, item in enumerate(unit):
            for first, stop in cuts[k]:
                array, found = _read(plan, reader, item, first, stop, folds)
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
                    array, found = _read(plan, reader, item, first, stop, folds)
                stats = ErrorStats()
                known = _activations(plan, item, first, stop, folds)
                tensor = encode_slice(plan, item, array, found if amax is None else amax, stats, known)
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
            report(item_bytes(item) * (stop - first) // len(item.indices))
    return errors


def encode_slice(
    plan: Plan,
    item: Item,
    array: NDArray[Any],
    amax: NDArray[np.float32],
    stats: ErrorStats,
    known: Activations | None = None,
) -> QuantizedTensor:
    """Codes and scales of a slice; ``amax`` of the tensors that share its scale, or of each expert.

    ``known``: what is known of the inputs that meet the slice.
    """
    fmt = item.format
    assert fmt is not None
    weights = known.importance if known else None
    try:
        if not (isinstance(fmt, BlockFormat) and fmt.has_tensor_scale):
            return encode(array, fmt, item.search, weights, amax=amax, stats=stats)
        scale = tensor_scale(amax, fmt, get_search(item.search), item.power_of_two)
        if plan.dialect.divisor:
            return encode(array, fmt, item.search, weights, divisor=np.float32(1) / scale, stats=stats)
        return encode(array, fmt, item.search, weights, tensor_scale=scale, stats=stats)
    except FormatError as error:
        raise CheckpointError(f"{item.weight.name}: {error}") from error


def _needs_amax(fmt: Format) -> bool:
    return isinstance(fmt, BlockFormat) and (fmt.has_tensor_scale or fmt.block == (-1, -1))


def _activations(plan: Plan, item: Item, first: int, stop: int, folds: Folds) -> Activations | None:
    """What is known of the inputs of part of a weight, divided as its columns are multiplied."""
    if plan.weighting is None or not item.weighted:
        return None
    fold = folds.get(item.weight.name)
    return plan.weighting.calibration.slice(item.weight.name, first, stop, fold.columns if fold else None)


def _read(
    plan: Plan, reader: Reader, item: Item, first: int, stop: int, folds: Folds
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Part of a weight, folded, and the largest magnitude of each of its matrices."""
    array = plan.checkpoint.read(reader, item.weight, first, stop)
    fold = folds.get(item.weight.name)
    if fold is not None:
        array = fold.apply(array, first)
    if array.dtype.itemsize > 4:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    found, finite = largest(array)
    if not finite:
        raise _not_finite(item.weight.name)
    return array, found


def _cuts(item: Item, whole: int, members: int) -> list[tuple[int, int]]:
    """Ranges of leading indices that are worked on at a time, or of ``whole`` rows and more for a matrix."""
    weight, todo = item.weight, item.indices
    one = nbytes("BF16", weight.shape[1:])
    step = max(1, SLICE_BYTES // max(one * members, 1))
    if len(weight.shape) == 2:
        # rows of a tile and packed zero points stay together
        step = max(whole, step // whole * whole)
    return [(i, min(i + step, todo.stop)) for i in range(todo.start, todo.stop, step)]


def item_bytes(item: Item) -> int:
    """Bytes of a weight in the source, or of those of its experts that the outputs hold."""
    return nbytes(item.weight.dtype, (item.parameters,))


def _not_finite(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} holds a NaN, an infinity or a value beyond FP32; repair the source, or drop the tensor by a rule"
    )
