"""llama.cpp's blocks: codes and scales of a format in one row of bytes, and back.

A block of 32 weights is its scale and 16 bytes, of which byte j holds code j in its low and code j + 16 in its high
half (Q8_0: 32 signed bytes). NVFP4 puts four blocks of 16 together: four scales, then 8 bytes for each block, of which
byte j holds codes j and j + 8. Layouts: ``ggml-common.h`` of llama.cpp; gguf's ``quants.py`` decodes them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import Format, QuantizedTensor
from halfbyte.formats.packing import pack_nibbles, unpack_nibbles

Bytes = NDArray[np.uint8]


class Block(NamedTuple):
    """ggml type, weights and bytes of a block, how many scales it has, and the bytes of one."""

    ggml: str
    weights: int
    nbytes: int
    scales: int
    scale_bytes: int


BLOCKS = {
    "mxfp4": Block("MXFP4", 32, 17, 1, 1),
    "nvfp4": Block("NVFP4", 64, 36, 4, 1),
    "nvfp4_unscaled": Block("NVFP4", 64, 36, 4, 1),
    "q4_0": Block("Q4_0", 32, 18, 1, 2),
    "iq4_nl_g32": Block("IQ4_NL", 32, 18, 1, 2),
    "q8_0": Block("Q8_0", 32, 34, 1, 2),
}
"""By format."""

FORMATS = {block.ggml: name for name, block in BLOCKS.items() if name != "nvfp4_unscaled"}
"""The format of each ggml type; NVFP4 is unscaled where no global scale lies beside it."""


def row_bytes(fmt: Format, k: int) -> int:
    """Bytes of a row of ``k`` weights, a multiple of the block's."""
    block = BLOCKS[fmt.name]
    return k // block.weights * block.nbytes


def pack_blocks(tensor: QuantizedTensor) -> Bytes:
    """Rows of blocks, uint8 [..., N, bytes], of a weight [..., N, K]; its global scale is not among them."""
    block = BLOCKS[tensor.format.name]
    rows = (*tensor.shape[:-1], tensor.shape[-1] // block.weights)
    out = np.empty((*rows, block.nbytes), dtype=np.uint8)
    head = block.scales * block.scale_bytes
    # little-endian, as the files are
    scales = np.ascontiguousarray(tensor.scales)
    out[..., :head] = scales.astype(scales.dtype.newbyteorder("<"), copy=False).view(np.uint8).reshape(*rows, head)
    each = block.weights // block.scales
    if tensor.codes.shape[-1] == tensor.shape[-1]:
        out[..., head:] = tensor.codes.reshape(*rows, block.weights)
    else:
        codes = unpack_nibbles(tensor.codes).reshape(*rows, block.scales, 2, each // 2)
        out[..., head:] = (codes[..., 0, :] | codes[..., 1, :] << 4).reshape(*rows, -1)
    return out.reshape(*tensor.shape[:-1], -1)


def unpack_blocks(stored: Bytes, fmt: Format, shape: tuple[int, ...]) -> tuple[Bytes, NDArray[Any]]:
    """Codes and scales of rows of blocks, shaped as in a QuantizedTensor of ``shape`` [..., N, K]."""
    block = BLOCKS[fmt.name]
    rows = (*shape[:-1], shape[-1] // block.weights)
    blocks = stored.reshape(*rows, block.nbytes)
    head = block.scales * block.scale_bytes
    codes_shape, (kind, scales_shape) = fmt.parts(shape)["codes"][1], fmt.parts(shape)["scales"]
    little = np.dtype(kind).newbyteorder("<")
    scales = np.ascontiguousarray(blocks[..., :head]).view(little).astype(kind, copy=False).reshape(scales_shape)
    if codes_shape[-1] == shape[-1]:
        return np.ascontiguousarray(blocks[..., head:]).reshape(codes_shape), scales
    each = block.weights // block.scales
    halves = blocks[..., head:].reshape(*rows, block.scales, each // 2)
    codes = np.stack([halves & 15, halves >> 4], axis=-2).reshape(*shape)
    return pack_nibbles(codes), scales
