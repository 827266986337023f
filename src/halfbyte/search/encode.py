"""``encode``: an array of weights to codes and scales, in any format by any search."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfbyte.errors import FormatError
from halfbyte.formats import AffineFormat, BlockFormat, Format, HiF4Format, QuantizedTensor, get_format
from halfbyte.formats.packing import pack_nibbles
from halfbyte.search.affine import encode_affine
from halfbyte.search.blocks import from_blocks, to_blocks
from halfbyte.search.hif4 import encode_hif4
from halfbyte.search.reference import encode_blocks
from halfbyte.search.rules import SMALLEST
from halfbyte.search.rules import tensor_scale as tensor_scale_of
from halfbyte.search.searches import Search, get_search

Floats = NDArray[np.float32]
_CHUNK = 1 << 17  # elements at a time: the working set stays in the cache


def encode(
    weight: ArrayLike,
    format: str | Format,
    search: str = "sweep",
    importance: ArrayLike | None = None,
    *,
    tensor_scale: ArrayLike | None = None,
    amax: ArrayLike | None = None,
    power_of_two: bool = False,
) -> QuantizedTensor:
    """Quantize ``weight`` [..., N, K] (BF16, FP16, FP32 or FP64) to ``format``.

    ``search`` names how scales and tables are chosen (``halfbyte.search.SEARCHES``). ``importance`` [K] or
    [..., K], non-negative, weights the squared error of each column. Leading dimensions are experts, each with
    a tensor scale of its own; ``tensor_scale`` FP32 [...] sets them (tensors that an engine fuses must share
    one), ``amax`` FP32 [...] derives them where ``weight`` is a slice of a larger tensor or fusion group, and
    ``power_of_two`` rounds them up to powers of two.

    Raises FormatError for unknown names, shapes that the format cannot hold, NaN and infinities.
    """
    fmt = get_format(format)
    how = get_search(search, fmt)
    array = np.asarray(weight)
    if array.dtype.kind not in "f" and array.dtype.name != "bfloat16":
        raise FormatError(f"cannot quantize values of type {array.dtype}; pass BF16, FP16 or FP32 weights")
    fmt.check(array.shape)
    array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        where = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
        raise FormatError(f"the weight holds a NaN or infinity, first at index {where}; repair the source")
    lead = array.shape[:-2]
    flat = array.reshape((-1, *array.shape[-2:]) if array.ndim > 1 else (1, 1, -1))
    weights = _importance(importance, array.shape)
    if isinstance(fmt, AffineFormat):
        return _affine(flat, array.shape, fmt, how, weights)
    if isinstance(fmt, HiF4Format):
        return _hif4(flat, array.shape, fmt, how, weights)
    assert isinstance(fmt, BlockFormat)
    scale: Floats | None = None
    if fmt.has_tensor_scale:
        scale = (
            tensor_scale_of(_amax(amax, flat, lead), fmt, how, power_of_two)
            if tensor_scale is None
            else _per_matrix(tensor_scale, lead, "tensor_scale").copy()
        )
        if not (np.isfinite(scale).all() and (scale >= SMALLEST).all()):
            raise FormatError("a tensor scale must be finite and positive (2**-126 or larger)")
    elif tensor_scale is not None:
        raise FormatError(f"{fmt.name} has no tensor scale; leave the argument tensor_scale out")
    if fmt.block == (-1, -1):
        return _whole(flat, array.shape, fmt, _amax(amax, flat, lead))
    return _block(flat, array.shape, fmt, how, scale, weights)


def _amax(given: ArrayLike | None, flat: Floats, lead: tuple[int, ...]) -> Floats:
    """Largest magnitude per leading index, shape [...]."""
    if given is None:
        return np.abs(flat).max(axis=(1, 2)).reshape(lead)
    return _per_matrix(given, lead, "amax")


def _per_matrix(given: ArrayLike, lead: tuple[int, ...], name: str) -> Floats:
    """One FP32 number per leading index, from one for all or one for each."""
    values = np.asarray(given, dtype=np.float32)
    if values.shape not in ((), lead):
        raise FormatError(f"{name} has shape {list(values.shape)}, but the weight needs {list(lead)} or one number")
    return np.broadcast_to(values, lead)


def _whole(flat: Floats, shape: tuple[int, ...], fmt: BlockFormat, amax: Floats) -> QuantizedTensor:
    """One scale for the whole matrix: always absmax, since a search over FP8 scales gains nothing."""
    table = fmt.tables[0]
    stored = fmt.scale.to_code(np.where(amax == 0, np.float32(1), amax / np.float32(table.top)))
    inverse = np.float32(1) / fmt.scale.to_value(stored)
    codes = table.encode(flat * inverse.reshape(-1, 1, 1))
    return QuantizedTensor(fmt, shape, codes.reshape(shape), stored.reshape(fmt.scales_shape(shape)))


def _block(
    flat: Floats,
    shape: tuple[int, ...],
    fmt: BlockFormat,
    search: Search,
    tensor_scale: Floats | None,
    weights: Floats | None,
) -> QuantizedTensor:
    blocks = to_blocks(flat, fmt.block)
    lead, per_matrix, size = blocks.shape
    blocks = blocks.reshape(-1, size)
    per_block = None if tensor_scale is None else np.repeat(tensor_scale.reshape(-1), per_matrix)
    codes = np.empty(blocks.shape, dtype=np.uint8)
    scales = np.empty(len(blocks), dtype=fmt.scale.dtype)
    rows = _row_weights(weights, flat.shape, fmt.block)
    step = max(1, _CHUNK // size)
    for i in range(0, len(blocks), step):
        part = slice(i, min(i + step, len(blocks)))
        codes[part], scales[part] = encode_blocks(
            blocks[part],
            fmt,
            search,
            None if per_block is None else per_block[part],
            None if rows is None else rows(part),
        )
    unpacked = from_blocks(codes, (lead, flat.shape[1], flat.shape[2]), fmt.block)
    packed = pack_nibbles(unpacked) if fmt.bits == 4 else unpacked
    parts = fmt.parts(shape)
    return QuantizedTensor(
        fmt, shape, packed.reshape(parts["codes"][1]), scales.reshape(parts["scales"][1]), tensor_scale
    )


def _affine(
    flat: Floats, shape: tuple[int, ...], fmt: AffineFormat, search: Search, weights: Floats | None
) -> QuantizedTensor:
    blocks = flat.reshape(-1, fmt.group)
    rows = _row_weights(weights, flat.shape, fmt.block)
    found: list[tuple[Any, ...]] = []
    for i in range(0, len(blocks), _CHUNK // fmt.group):
        part = slice(i, min(i + _CHUNK // fmt.group, len(blocks)))
        found.append(encode_affine(blocks[part], fmt, search, None if rows is None else rows(part)))
    codes, scales, offsets = (np.concatenate(column) for column in zip(*found, strict=True))
    packed = pack_nibbles(codes) if fmt.bits == 4 else codes
    groups = (*shape[:-1], shape[-1] // fmt.group)
    return QuantizedTensor(
        fmt,
        shape,
        packed.reshape(fmt.parts(shape)["codes"][1]),
        scales.reshape(groups),
        None,
        offsets.reshape(groups),
    )


def _hif4(
    flat: Floats, shape: tuple[int, ...], fmt: HiF4Format, search: Search, weights: Floats | None
) -> QuantizedTensor:
    blocks = flat.reshape(-1, 64)
    rows = _row_weights(weights, flat.shape, fmt.block)
    found = []
    for i in range(0, len(blocks), _CHUNK // 64):
        part = slice(i, min(i + _CHUNK // 64, len(blocks)))
        found.append(encode_hif4(blocks[part], search, None if rows is None else rows(part)))
    codes, words = (np.concatenate(column) for column in zip(*found, strict=True))
    parts = fmt.parts(shape)
    return QuantizedTensor(
        fmt, shape, pack_nibbles(codes).reshape(parts["codes"][1]), words.reshape(parts["scales"][1])
    )


def _importance(importance: ArrayLike | None, shape: tuple[int, ...]) -> Floats | None:
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
    return None if largest == 0 else (weights / largest).reshape(-1, shape[-1])


def _row_weights(weights: Floats | None, shape: tuple[int, ...], block: tuple[int, int]) -> Any:
    """A function that gives the weights of a slice of blocks, shaped like the blocks."""
    if weights is None:
        return None
    lead, n, k = shape
    if block[0] == 1:
        columns = block[1] if block[1] > 0 else k
        by_block = weights.reshape(len(weights), k // columns, columns)
        count = n * (k // columns)

        def rows(part: slice) -> Floats:
            index = np.arange(part.start, part.stop)
            return np.asarray(by_block[(index // count) % len(weights), index % (k // columns)])

        return rows
    spread = to_blocks(np.broadcast_to(weights[:, None, :], (lead, n, k)).copy(), block)
    merged = spread.reshape(-1, spread.shape[2])
    return lambda part: merged[part]
