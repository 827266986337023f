"""The NumPy reference on whole weights [L, N, K]: fills the arrays of a QuantizedTensor, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from halfbyte.formats import Format, QuantizedTensor
from halfbyte.formats.arrays import Floats
from halfbyte.formats.packing import pack_codes
from halfbyte.search.blocks import from_blocks, to_blocks
from halfbyte.search.searches import Search

_CHUNK = 1 << 17  # elements at a time: the working set stays in the cache


def encode_reference(x: Floats, out: QuantizedTensor, search: Search, weights: Floats | None) -> None:
    """Encode x [L, N, K] into the arrays of ``out``; weights [1 or L, K], the largest 1."""
    fmt = out.format
    if fmt.scale_per_matrix:
        return _whole(x, fmt, out)
    blocks = to_blocks(x, fmt.block)
    lead, per_matrix, size = blocks.shape
    blocks = blocks.reshape(-1, size)
    scale = None if out.global_scale is None else np.repeat(out.global_scale.reshape(-1), per_matrix)
    rows = _row_weights(weights, x.shape, fmt.block)
    codes = np.empty(blocks.shape, dtype=np.uint8)
    scales, offsets = out.scales.reshape(-1), None if out.offsets is None else out.offsets.reshape(-1)
    step = max(1, _CHUNK // size)
    for i in range(0, len(blocks), step):
        part = slice(i, min(i + step, len(blocks)))
        weight = None if rows is None else rows(part)
        encoded = fmt.encode_reference(blocks[part], search, None if scale is None else scale[part], weight)
        codes[part], scales[part] = encoded.codes, encoded.scales
        if offsets is not None:
            offsets[part] = encoded.offsets
    unpacked = from_blocks(codes, (lead, x.shape[1], x.shape[2]), fmt.block)
    out.codes[...] = pack_codes(unpacked, 8 * out.codes.shape[-1] // x.shape[2]).reshape(out.codes.shape)


def _whole(x: Floats, fmt: Format, out: QuantizedTensor) -> None:
    """One scale for the whole matrix, which is in ``out`` already."""
    assert fmt.scale is not None
    inverse = np.float32(1) / fmt.scale.to_value(out.scales)
    out.codes[...] = fmt.codebooks[0].encode(x * inverse.reshape(-1, 1, 1)).reshape(out.codes.shape)


def _row_weights(
    weights: Floats | None, shape: tuple[int, ...], block: tuple[int, int]
) -> Callable[[slice], Floats] | None:
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
