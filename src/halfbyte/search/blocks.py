"""From a weight [L, N, K] to rows of block elements, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_blocks(array: NDArray[Any], block: tuple[int, int]) -> NDArray[Any]:
    """View or copy [L, N, K] as [L, blocks, elements]; two-dimensional blocks are padded with zeros."""
    lead, n, k = array.shape
    rows, columns = block
    if rows == 1:
        return array.reshape(lead, -1, columns if columns > 0 else k)
    if rows < 0:
        return array.reshape(lead, 1, n * k)
    array = np.pad(array, ((0, 0), (0, -n % rows), (0, -k % columns)))
    tall, wide = array.shape[1] // rows, array.shape[2] // columns
    tiled = array.reshape(lead, tall, rows, wide, columns).transpose(0, 1, 3, 2, 4)
    return tiled.reshape(lead, tall * wide, rows * columns)


def from_blocks(blocks: NDArray[Any], shape: tuple[int, int, int], block: tuple[int, int]) -> NDArray[Any]:
    """The inverse of ``to_blocks`` for a weight of ``shape`` [L, N, K]; padding is cut off."""
    lead, n, k = shape
    rows, columns = block
    if rows <= 1:
        return blocks.reshape(shape)
    tall, wide = -(-n // rows), -(-k // columns)
    tiled = blocks.reshape(lead, tall, wide, rows, columns).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(tiled.reshape(lead, tall * rows, wide * columns)[:, :n, :k])
