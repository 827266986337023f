"""A slice of a weight on its way to codes: read, smoothed, rotated, and encoded with what is known of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.calibration import Activations
from halfbyte.checkpoint import Reader
from halfbyte.convert.given_tensors import GivenTensors
from halfbyte.convert.hessian_cache import Hessians
from halfbyte.convert.refusals import Refusals
from halfbyte.errors import FormatError, UnconvertibleError
from halfbyte.formats import Format, QuantizedTensor, rotation_of, stacked
from halfbyte.formats.rotation import Swaps
from halfbyte.kernels import ErrorStats
from halfbyte.kernels import amax as largest
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.resources import Limits
from halfbyte.plan.shards import Item
from halfbyte.search import encode, get_search, global_scale
from halfbyte.search.encode_options import GptqOptions, Refine
from halfbyte.search.gptq import gptq
from halfbyte.search.output_metric import PreparedOutput
from halfbyte.search.prepared import Prepared
from halfbyte.search.soar import soar_global_scale
from halfbyte.source.smoothing import Smoothing

Array = NDArray[Any]
Floats = NDArray[np.float32]
# times the square root of any block, this is still in the range of FP32
_LARGEST_ROTATED = np.float32(1e36)
Progress = Callable[[int], None]
"""Called with the number of source bytes that have just been dealt with."""


@dataclass
class Context:
    """What all units of a conversion have in common; ``smoothings`` by weight name, ``given``: what is not encoded."""

    plan: Plan
    reader: Reader
    smoothings: Mapping[str, Smoothing]
    report: Progress
    limits: Limits
    hessians: Hessians | None = None
    refusals: Refusals = field(default_factory=Refusals)
    given: GivenTensors | None = None


def read_values(
    plan: Plan, reader: Reader, item: Item, first: int, stop: int, smoothing: Smoothing | None = None
) -> tuple[Array, Floats]:
    """Part of a weight, smoothed, and the largest magnitude of each of its matrices."""
    array = _smoothed(plan, reader, item, first, stop, smoothing)
    return array, _largest(array, item)


def read_slice(context: Context, item: Item, first: int, stop: int) -> tuple[Array, Floats]:
    """The same, in the space in which it is encoded: rotated where its format is that of rotated weights."""
    smoothing, fmt = context.smoothings.get(item.weight.name), item.format
    array = _smoothed(context.plan, context.reader, item, first, stop, smoothing)
    if fmt is not None:
        try:
            array, _ = fmt.rotate(array, _rotation(context, item, first, stop))
        except FormatError as error:
            raise not_finite(item.weight.name) from error
    amax = _largest(array, item)
    if rotation_of(fmt) is not None and (amax > _LARGEST_ROTATED).any():
        reason = f"has values up to {amax.max():.3g}, too large to be rotated back in FP32"
        raise UnconvertibleError(f"{item.weight.name} {reason}", {item.weight.name: reason})
    return array, amax


def known_of(context: Context, item: Item, first: int, stop: int) -> Activations | None:
    """What is known of the inputs of part of a weight, divided as its columns are multiplied."""
    rotated = rotation_of(item.format) is not None
    if context.plan.calibration_use is None or not (item.weighted or item.method or rotated):
        return None
    prepared = None
    if item.method and context.hessians:
        prepared = context.hessians.slice(item, first, stop, columns_of(context, item))
    outputs = context.hessians.outputs(item, first, stop) if prepared and context.hessians else None
    swaps = _rotation(context, item, first, stop) if rotated else None
    return Activations(importance_of(context, item, first, stop), prepared, swaps, outputs)


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
    stats: Sequence[ErrorStats],
    known: Activations | None = None,
    fitted: Floats | None = None,
    device: str = "cpu",
) -> QuantizedTensor:
    """Codes and scales of a slice; ``amax`` of the tensors that share its scale, or of each expert.

    ``stats`` takes the errors: one for a matrix, one for each expert of a stack. UnconvertibleError names the weight
    where the format has no scales for its values.
    ``known``: what is known of the inputs that meet the slice; ``fitted``: the global scale that was found for
    matrices that share it, while each expert's is found here. For a format in rotated space all of it is that of
    the rotated weight. ``device``: where searches run that have a kernel there.
    """
    assert item.format is not None
    fmt = item.format.plain
    weights = known.importance if known else None
    prepared = known.prepared if known else None
    outputs = known.outputs if known and known.outputs else None
    refine = item.method.refine if item.method else None
    rotation = known.rotation if known else None
    try:
        scales = _scales(plan, item, array, amax, weights, fitted)
        if len(array.shape) < 3:
            rounding = _Rounding(prepared[0] if prepared else None, outputs[0] if outputs else None, refine)
            tensor = _encode(fmt, item.search, array, weights, rounding, scales, stats[0], device)
            return item.format.from_plain(tensor, rotation)
        each = [
            _encode(
                fmt,
                item.search,
                array[i : i + 1],
                weights if weights is None or weights.ndim == 1 else weights[i : i + 1],
                _Rounding(prepared[i] if prepared else None, outputs[i] if outputs else None, refine),
                {name: value if np.ndim(value) == 0 else value[i : i + 1] for name, value in scales.items()},
                expert_stats,
                device,
            )
            for i, expert_stats in enumerate(stats)
        ]
        return item.format.from_plain(each[0] if len(each) == 1 else stacked(each), rotation)
    except FormatError as error:
        raise UnconvertibleError(f"{item.weight.name}: {error}", {item.weight.name: str(error)}) from error


def _scales(
    plan: Plan, item: Item, array: Array, amax: Floats, weights: Floats | None, fitted: Floats | None
) -> dict[str, Any]:
    """What settles the scales of a slice, as ``encode`` takes it: amax, or the global scale in the dialect's way."""
    assert item.format is not None
    fmt, inverse = item.format.plain, plan.dialect.spelling.global_scale_inv
    if not fmt.has_global_scale:
        return {"amax": amax}
    scale = global_scale(amax, fmt, get_search(item.search), item.power_of_two) if fitted is None else fitted
    if item.fitted and len(array.shape) > 2:
        scale = soar_global_scale([array], fmt, item.search, weights, global_scale_inv=inverse).global_scale
    if not inverse:
        return {"global_scale": scale}
    with np.errstate(divide="ignore", over="ignore"):
        reciprocal = np.float32(1) / scale
    if not np.isfinite(reciprocal).all():
        raise FormatError(f"its values are so small that the global scale of {fmt.name} has no finite reciprocal")
    return {"global_scale_inv": reciprocal}


def not_finite(name: str) -> UnconvertibleError:
    """What is said of a weight with values that no format holds."""
    return UnconvertibleError(
        f"{name} holds a NaN, an infinity or a value beyond FP32; repair the source, or drop the tensor by a rule"
    )


def _smoothed(plan: Plan, reader: Reader, item: Item, first: int, stop: int, smoothing: Smoothing | None) -> Array:
    array = plan.checkpoint.read(reader, item.weight, first, stop)
    if smoothing is not None:
        array = smoothing.apply(array, first)
    if array.dtype.itemsize > 4:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    return array


class _Rounding(NamedTuple):
    """What rounds a matrix with Hessians; to nearest without ``prepared``."""

    prepared: Prepared | None
    output: PreparedOutput | None
    refine: Refine | None


def _encode(
    fmt: Format,
    search: str,
    array: Array,
    weights: Floats | None,
    rounding: _Rounding,
    scales: dict[str, Any],
    stats: ErrorStats,
    device: str,
) -> QuantizedTensor:
    if rounding.prepared is None and device != "cpu":
        from halfbyte.gpu.device_encode import encode_on_device, encodes

        if encodes(fmt, get_search(search, fmt)):
            return encode_on_device(array, fmt, search, device=device, importance=weights, stats=stats, **scales)
    if rounding.prepared is None:
        return encode(array, fmt, search, weights, stats=stats, **scales)
    how = GptqOptions(output=rounding.output, refine=rounding.refine, stats=stats)
    return gptq(array, fmt, search, rounding.prepared, options=how, **scales)


def columns_of(context: Context, item: Item) -> Floats | None:
    """Return what smoothing multiplies a weight's columns by, FP32 [K] or [E, K]; None where nothing does."""
    smoothing = context.smoothings.get(item.weight.name)
    return smoothing.columns if smoothing else None


def _rotation(context: Context, item: Item, first: int, stop: int) -> Swaps | None:
    """Steps of a slice's rotation that are found from its inputs; None for the Hadamard matrix."""
    return context.hessians.rotation(item, first, stop, columns_of(context, item)) if context.hessians else None


def _largest(array: Array, item: Item) -> Floats:
    value, finite = largest(array)
    if not finite:
        raise not_finite(item.weight.name)
    return value
