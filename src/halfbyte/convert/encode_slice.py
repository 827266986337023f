"""A slice of a weight on its way to codes: read, folded, rotated, and encoded with what is known of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.calibration import Activations
from halfbyte.checkpoint import Reader
from halfbyte.convert.hessian_cache import Hessians
from halfbyte.errors import CheckpointError, FormatError
from halfbyte.formats import Format, QuantizedTensor, rotation_of, stacked
from halfbyte.formats.rotation import Swaps
from halfbyte.kernels import ErrorStats
from halfbyte.kernels import amax as largest
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.resources import Limits
from halfbyte.plan.shards import Item
from halfbyte.search import encode, get_search, global_scale
from halfbyte.search.gptq import Prepared, gptq
from halfbyte.search.soar import soar_global_scale
from halfbyte.source.smoothing import Smoothing

Array = NDArray[Any]
Floats = NDArray[np.float32]
Progress = Callable[[int], None]
"""Called with the number of source bytes that have just been dealt with."""


@dataclass
class Context:
    """What all units of a conversion have in common; ``smoothings`` by weight name."""

    plan: Plan
    reader: Reader
    smoothings: Mapping[str, Smoothing]
    report: Progress
    limits: Limits
    hessians: Hessians | None = None


def read_values(
    plan: Plan, reader: Reader, item: Item, first: int, stop: int, fold: Smoothing | None = None
) -> tuple[Array, Floats]:
    """Part of a weight, folded, and the largest magnitude of each of its matrices."""
    array = _folded(plan, reader, item, first, stop, fold)
    return array, _largest(array, item)


def read_slice(context: Context, item: Item, first: int, stop: int) -> tuple[Array, Floats]:
    """The same, in the space in which it is encoded: rotated where its format is that of rotated weights."""
    fold, fmt = context.smoothings.get(item.weight.name), item.format
    array = _folded(context.plan, context.reader, item, first, stop, fold)
    if fmt is not None:
        try:
            array, _ = fmt.rotate(array, _rotation(context, item, first, stop))
        except FormatError as error:
            raise not_finite(item.weight.name) from error
    return array, _largest(array, item)


def known_of(context: Context, item: Item, first: int, stop: int) -> Activations | None:
    """What is known of the inputs of part of a weight, divided as its columns are multiplied."""
    rotated = rotation_of(item.format) is not None
    if context.plan.calibration_use is None or not (item.weighted or item.method or rotated):
        return None
    prepared = None
    if item.method and context.hessians:
        prepared = context.hessians.slice(item, first, stop, columns_of(context, item))
    swaps = _rotation(context, item, first, stop) if rotated else None
    return Activations(importance_of(context, item, first, stop), prepared, swaps)


def importance_of(context: Context, item: Item, first: int, stop: int) -> Floats | None:
    """What weighs the errors of a slice's columns, if anything does."""
    if context.plan.calibration_use is None or not item.weighted:
        return None
    calibration = context.plan.calibration_use.calibration
    return calibration.slice(item.weight.name, first, stop, columns_of(context, item)).importance


def encode_slice(
    plan: Plan,
    item: Item,
    array: Array,
    amax: Floats,
    stats: ErrorStats,
    known: Activations | None = None,
    fitted: Floats | None = None,
) -> QuantizedTensor:
    """Codes and scales of a slice; ``amax`` of the tensors that share its scale, or of each expert.

    ``known``: what is known of the inputs that meet the slice; ``fitted``: the global scale that was found for
    matrices that share it, while each expert's is found here. For a format in rotated space all of it is that of
    the rotated weight.
    """
    assert item.format is not None
    fmt = item.format.plain
    weights = known.importance if known else None
    scales: dict[str, Any] = {"amax": amax}
    if fmt.has_global_scale:
        scale = global_scale(amax, fmt, get_search(item.search), item.power_of_two) if fitted is None else fitted
        if item.fitted and len(array.shape) > 2:
            scale = soar_global_scale(
                [array], fmt, item.search, weights, global_scale_inv=plan.dialect.spelling.global_scale_inv
            ).global_scale
        inverse = plan.dialect.spelling.global_scale_inv
        scales = {"global_scale_inv": np.float32(1) / scale} if inverse else {"global_scale": scale}
    prepared = known.prepared if known else None
    try:
        if prepared is None or len(array.shape) < 3:
            tensor = _encode(fmt, item.search, array, weights, prepared[0] if prepared else None, scales, stats)
            return item.format.from_plain(tensor, known.rotation if known else None)
        each = [
            _encode(
                fmt,
                item.search,
                array[i : i + 1],
                weights if weights is None or weights.ndim == 1 else weights[i : i + 1],
                one,
                {name: value if np.ndim(value) == 0 else value[i : i + 1] for name, value in scales.items()},
                stats,
            )
            for i, one in enumerate(prepared)
        ]
        return item.format.from_plain(stacked(each), known.rotation if known else None)
    except FormatError as error:
        raise CheckpointError(f"{item.weight.name}: {error}") from error


def not_finite(name: str) -> CheckpointError:
    """What is said of a weight with values that no format holds."""
    return CheckpointError(
        f"{name} holds a NaN, an infinity or a value beyond FP32; repair the source, or drop the tensor by a rule"
    )


def _folded(plan: Plan, reader: Reader, item: Item, first: int, stop: int, fold: Smoothing | None) -> Array:
    array = plan.checkpoint.read(reader, item.weight, first, stop)
    if fold is not None:
        array = fold.apply(array, first)
    if array.dtype.itemsize > 4:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    return array


def _encode(
    fmt: Format,
    search: str,
    array: Array,
    weights: Floats | None,
    prepared: Prepared | None,
    scales: dict[str, Any],
    stats: ErrorStats,
) -> QuantizedTensor:
    if prepared is None:
        return encode(array, fmt, search, weights, stats=stats, **scales)
    return gptq(array, fmt, search, prepared, stats=stats, **scales)


def columns_of(context: Context, item: Item) -> Floats | None:
    """Return what smoothing multiplies a weight's columns by, FP32 [K] or [E, K]; None where nothing does."""
    fold = context.smoothings.get(item.weight.name)
    return fold.columns if fold else None


def _rotation(context: Context, item: Item, first: int, stop: int) -> Swaps | None:
    """Steps of a slice's rotation that are found from its inputs; None for the Hadamard matrix."""
    return context.hessians.rotation(item, first, stop, columns_of(context, item)) if context.hessians else None


def _largest(array: Array, item: Item) -> Floats:
    found, finite = largest(array)
    if not finite:
        raise not_finite(item.weight.name)
    return found
