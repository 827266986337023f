"""``encode``: an array of weights to codes and scales, in any format by any search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfbyte import kernels
from halfbyte.errors import FormatError
from halfbyte.formats import BlockFormat, Format, QuantizedTensor, get_format
from halfbyte.formats.rotation import Swaps, check_swaps
from halfbyte.kernels import ErrorStats
from halfbyte.search.numpy_backend import encode_reference
from halfbyte.search.rules import SMALLEST
from halfbyte.search.rules import global_scale as global_scale_of
from halfbyte.search.searches import Search, get_search

Floats = NDArray[np.float32]


def encode(
    weight: ArrayLike,
    format: str | Format,
    search: str = "sweep",
    importance: ArrayLike | None = None,
    *,
    global_scale: ArrayLike | None = None,
    global_scale_inv: ArrayLike | None = None,
    amax: ArrayLike | None = None,
    power_of_two: bool = False,
    rotation: ArrayLike | None = None,
    stats: ErrorStats | None = None,
) -> QuantizedTensor:
    """Quantize ``weight`` [..., N, K] (BF16, FP16, FP32 or FP64; a NumPy array or a torch CPU tensor) to ``format``.

    ``search`` names how scales and tables are chosen (``halfbyte.search.SEARCHES``). ``importance`` [K] or
    [..., K], non-negative, weights the squared error of each column. Leading dimensions are experts, each with
    a global scale of its own; ``global_scale`` FP32 [...] sets them (tensors that an engine fuses must share
    one), ``global_scale_inv`` FP32 [...] sets them as the reciprocals that some checkpoints store, ``amax`` FP32 [...]
    derives them where ``weight`` is a slice of a larger tensor or fusion group, and ``power_of_two`` rounds them
    up to powers of two. ``rotation`` uint8 [..., K/B, steps]: steps of a format in rotated space, by default the
    Hadamard matrix. The error of the result is added to ``stats``.

    Native code does the work where there is some (``halfbyte.kernels.backend()``), on one thread and without
    holding Python's lock. Raises FormatError for unknown names, shapes that the format cannot hold, NaN and
    infinities.
    """
    fmt = get_format(format)
    how = get_search(search, fmt)
    if isinstance(fmt, BlockFormat) and fmt.rotation:
        if importance is not None:
            raise FormatError(f"{fmt.name} mixes the channels of each block, so importance of single ones cannot weigh")
        turned, swaps = into_rotated_space(weight, fmt, rotation)
        scales: dict[str, Any] = {"global_scale": global_scale, "global_scale_inv": global_scale_inv, "amax": amax}
        plain = encode(turned, fmt.plain, search, power_of_two=power_of_two, stats=stats, **scales)
        return replace(plain, format=fmt, rotation=swaps)
    if rotation is not None:
        raise FormatError(f"{fmt.name} is in no rotated space; leave the argument rotation out")
    array = as_weight(weight, fmt)
    flat = array.reshape((-1, *array.shape[-2:]) if array.ndim > 1 else (1, 1, -1))
    weights = relative_importance(importance, array.shape)
    out = empty(fmt, array.shape)
    set_scales(out, how, array, global_scale, global_scale_inv, amax, power_of_two)
    if kernels.supports(fmt, how):
        finite = kernels.encode_into(
            flat, fmt, how, out.codes, out.scales, out.offsets, out.global_scale, out.global_scale_inv, weights, stats
        )
        check_finite(finite, array)
        return out
    wide = flat.astype(np.float32, copy=False)
    check_finite(bool(np.isfinite(wide).all()), array)
    encode_reference(wide, out, how, weights)
    if stats is not None:
        kernels.compare(out, array, stats)
    return out


def as_weight(weight: ArrayLike, fmt: Format) -> NDArray[Any]:
    """A contiguous array of BF16, FP16 or FP32 that the format can hold; FormatError otherwise."""
    array = kernels.as_array(weight)
    if array.dtype.kind not in "f" and array.dtype.name != "bfloat16":
        raise FormatError(f"cannot quantize values of type {array.dtype}; pass BF16, FP16 or FP32 weights")
    fmt.check(array.shape)
    if array.dtype.name not in ("bfloat16", "float16", "float32"):
        array = array.astype(np.float32)
    return np.ascontiguousarray(array)


def into_rotated_space(weight: ArrayLike, fmt: BlockFormat, rotation: ArrayLike | None) -> tuple[Floats, Swaps | None]:
    """A weight [..., N, K] times the rotation of its format, FP32, and that rotation's steps as they are stored."""
    array = as_weight(weight, fmt)
    assert fmt.rotation is not None
    swaps = check_swaps(rotation, fmt.rotation, array.shape, fmt.block[1])
    turned = array.astype(np.float32)
    kernels.rotate(turned, fmt, swaps)
    if not kernels.amax(turned)[1]:
        check_finite(bool(np.isfinite(array.astype(np.float32)).all()), array)
        raise FormatError("the weight leaves the range of FP32 where it is rotated; its values are too large")
    return turned, swaps


def empty(fmt: Format, shape: tuple[int, ...]) -> QuantizedTensor:
    """The arrays of a quantized weight of this shape, not filled."""
    parts = {name: np.empty(shape, dtype=dtype) for name, (dtype, shape) in fmt.parts(shape).items()}
    return QuantizedTensor(fmt, shape, **parts)


def set_scales(
    out: QuantizedTensor,
    search: Search,
    array: NDArray[Any],
    global_scale: ArrayLike | None,
    global_scale_inv: ArrayLike | None,
    amax: ArrayLike | None,
    power_of_two: bool,
) -> None:
    """Fill in what the kernels must know beforehand: global scales, or the scale of a whole tensor."""
    fmt, lead = out.format, array.shape[:-2]
    tensor_wide = fmt.has_global_scale
    if not tensor_wide and (global_scale is not None or global_scale_inv is not None):
        raise FormatError(f"{fmt.name} has no global scale; leave the arguments global_scale and global_scale_inv out")
    if not fmt.shares_scale:
        return
    if global_scale is None and global_scale_inv is None:
        largest = _per_matrix(amax, lead, "amax") if amax is not None else _amax(array)
    if fmt.scale_per_matrix:
        assert fmt.scale is not None
        # always absmax, since a search over FP8 scales gains nothing
        top = np.float32(fmt.codebooks[0].top)
        stored = fmt.scale.to_code(np.where(largest == 0, np.float32(1), largest / top))
        out.scales[...] = stored.reshape(out.scales.shape)
        return
    if global_scale_inv is not None:
        if global_scale is not None:
            raise FormatError("give the global scale or its reciprocal, divisor, not both")
        out.global_scale_inv = _per_matrix(global_scale_inv, lead, "global_scale_inv").copy()
        with np.errstate(divide="ignore"):
            scale = np.float32(1) / out.global_scale_inv
    elif global_scale is not None:
        scale = _per_matrix(global_scale, lead, "global_scale")
    else:
        scale = global_scale_of(largest, fmt, search, power_of_two)
    if not (np.isfinite(scale).all() and (scale >= SMALLEST).all()):
        raise FormatError("a global scale must be finite and positive (2**-126 or larger)")
    assert out.global_scale is not None
    out.global_scale[...] = scale


def _amax(array: NDArray[Any]) -> Floats:
    largest, finite = kernels.amax(array)
    check_finite(finite, array)
    return largest


def check_finite(finite: bool, array: NDArray[Any]) -> None:
    """FormatError that names the first NaN or infinity, where ``finite`` says that there is one."""
    if not finite:
        where = [int(i) for i in np.argwhere(~np.isfinite(array.astype(np.float32)))[0]]
        raise FormatError(f"the weight holds a NaN or infinity, first at index {where}; repair the source")


def _per_matrix(given: ArrayLike, lead: tuple[int, ...], name: str) -> Floats:
    """One FP32 number per leading index, from one for all or one for each."""
    values = np.asarray(given, dtype=np.float32)
    if values.shape not in ((), lead):
        raise FormatError(f"{name} has shape {list(values.shape)}, but the weight needs {list(lead)} or one number")
    return np.broadcast_to(values, lead)


def relative_importance(importance: ArrayLike | None, shape: tuple[int, ...]) -> Floats | None:
    """Column weights [L, K] or [1, K], scaled so that the largest is 1."""
    if importance is None:
        return None
    weights = np.asarray(importance, dtype=np.float32)
    if weights.shape not in ((shape[-1],), (*shape[:-2], shape[-1])):
        wanted = f"[{shape[-1]}]" + (f" or {[*shape[:-2], shape[-1]]}" if len(shape) > 2 else "")
        raise FormatError(f"importance has shape {list(weights.shape)}, but the weight needs {wanted}")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise FormatError("importance must be finite and not negative")
    largest = weights.max(initial=0)
    return None if largest == 0 else np.ascontiguousarray((weights / largest).reshape(-1, shape[-1]))
