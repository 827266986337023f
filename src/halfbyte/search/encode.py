"""``encode``: an array of weights to codes and scales, in any format by any search."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from halfbyte import kernels
from halfbyte.errors import FormatError
from halfbyte.formats import Format, QuantizedTensor, get_format
from halfbyte.formats.arrays import Array, Floats
from halfbyte.formats.format import check_finite
from halfbyte.formats.losses import SMALLEST
from halfbyte.search.encode_options import EncodeKeywords, EncodeOptions, ScaleOptions
from halfbyte.search.numpy_backend import encode_reference
from halfbyte.search.searches import Search, get_search, global_scale

if TYPE_CHECKING:
    from halfbyte.search.encode_options import Unpack


def encode(
    weight: ArrayLike,
    format: str | Format,
    search: str | Search = "sweep",
    importance: ArrayLike | None = None,
    *,
    options: EncodeOptions | None = None,
    **keywords: Unpack[EncodeKeywords],
) -> QuantizedTensor:
    """Quantize ``weight`` [..., N, K] (BF16, FP16, FP32 or FP64; a NumPy array or a torch CPU tensor) to ``format``.

    ``search`` names how scales and codebooks are chosen (``halfbyte.search.SEARCHES``), or is such an object itself.
    ``importance`` [K] or [..., K], non-negative, weights the squared error of each column. Leading dimensions are
    experts, each with a global scale of its own. Keyword arguments are the fields of ``EncodeOptions``
    (``global_scale``, ``global_scale_inv``, ``amax``, ``power_of_two``, ``rotation``, ``stats``) and go before those
    in ``options``.

    Native code does the work where there is some (``halfbyte.kernels.backend()``), on one thread and without
    holding Python's lock. Raises FormatError for unknown names, shapes that the format cannot hold, NaN and
    infinities.
    """
    fmt = get_format(format)
    scale_search = get_search(search, fmt)
    chosen = replace(options or EncodeOptions(), **keywords)
    if importance is not None:
        chosen = replace(chosen, importance=importance)
    if chosen.importance is not None and fmt.rotation:
        raise FormatError(f"{fmt.name} mixes the channels of each block, so importance of single ones cannot weigh")
    array, steps = fmt.rotate(as_weight(weight, fmt), chosen.rotation)
    return fmt.from_plain(_encode_plain(array, fmt.plain, scale_search, chosen), steps)


def _encode_plain(array: Array, fmt: Format, search: Search, options: EncodeOptions) -> QuantizedTensor:
    """Encode a weight in a format without rotation, by compiled code or by NumPy."""
    weights = relative_importance(options.importance, array.shape)
    out = empty(fmt, array.shape)
    set_scales(out, search, array, options)
    if kernels.supports(fmt, search):
        if not kernels.encode_into(out, array, search, weights, options.stats):
            check_finite(array)
        return out
    check_finite(array)
    matrices = array.reshape((-1, *array.shape[-2:]) if array.ndim > 1 else (1, 1, -1))
    encode_reference(matrices.astype(np.float32, copy=False), out, search, weights)
    if options.stats is not None:
        kernels.compare(out, array, options.stats)
    return out


def as_weight(weight: ArrayLike, fmt: Format) -> Array:
    """A contiguous array of BF16, FP16 or FP32 that the format can hold; FormatError otherwise."""
    array = kernels.as_array(weight)
    if array.dtype.kind not in "f" and array.dtype.name != "bfloat16":
        raise FormatError(f"cannot quantize values of type {array.dtype}; pass BF16, FP16 or FP32 weights")
    fmt.check(array.shape)
    if array.dtype.name not in ("bfloat16", "float16", "float32"):
        array = array.astype(np.float32)
    return np.ascontiguousarray(array)


def empty(fmt: Format, shape: tuple[int, ...]) -> QuantizedTensor:
    """The arrays of a quantized weight of this shape, not filled."""
    parts = {name: np.empty(shape, dtype=dtype) for name, (dtype, shape) in fmt.parts(shape).items()}
    return QuantizedTensor(fmt, shape, **parts)


def set_scales(out: QuantizedTensor, search: Search, array: Array, options: ScaleOptions) -> None:
    """Fill in what the kernels must know beforehand: global scales, or the scale of a whole tensor."""
    fmt, lead = out.format, array.shape[:-2]
    given, inverse = options.global_scale, options.global_scale_inv
    if not fmt.has_global_scale and (given is not None or inverse is not None):
        raise FormatError(f"{fmt.name} has no global scale; leave the arguments global_scale and global_scale_inv out")
    if not fmt.shares_scale:
        return
    if given is None and inverse is None:
        largest = _per_matrix(options.amax, lead, "amax") if options.amax is not None else _amax(array)
    if fmt.scale_per_matrix:
        assert fmt.scale is not None
        # always absmax, since a search over FP8 scales gains nothing
        top = np.float32(fmt.codebooks[0].top)
        stored = fmt.scale.to_code(np.where(largest == 0, np.float32(1), largest / top))
        out.scales[...] = stored.reshape(out.scales.shape)
        return
    if inverse is not None:
        if given is not None:
            raise FormatError("give the global scale or its reciprocal, global_scale_inv, not both")
        out.global_scale_inv = _per_matrix(inverse, lead, "global_scale_inv").copy()
        with np.errstate(divide="ignore"):
            scale = np.float32(1) / out.global_scale_inv
    elif given is not None:
        scale = _per_matrix(given, lead, "global_scale")
    else:
        scale = global_scale(largest, fmt, search, options.power_of_two)
    if not (np.isfinite(scale).all() and (scale >= SMALLEST).all()):
        raise FormatError("a global scale must be finite and positive (2**-126 or larger)")
    assert out.global_scale is not None
    out.global_scale[...] = scale


def _amax(array: Array) -> Floats:
    largest, finite = kernels.amax(array)
    if not finite:
        check_finite(array)
    return largest


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
