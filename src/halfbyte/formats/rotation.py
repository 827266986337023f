"""Rotations of weights before they are rounded: the channels of each block are mixed.

For an orthogonal R, x W^T = (x R) (W R)^T. What is stored is W R; decoding multiplies by R^T, so that every reader sees
W, and an engine that rotates its activations may leave W R as it is. The normalised Hadamard matrix H (Sylvester's
order, symmetric) spreads an outlier evenly over its block. DuQuant's rotations (arXiv 2406.01721; one per block as in
DuQuant++, arXiv 2604.17789) are products of steps that first swap a channel with the first one of the block: R =
P_1 H P_2 H ...; they are stored as the numbers of these channels, so that R is known exactly.

The order of FP32 operations is defined: sums and differences at distances 1, 2, 4 ..., then one product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import FormatError
from halfbyte.formats.arrays import Codes

Swaps = Codes
"""Steps of rotations: numbers of channels, uint8 [..., K/B, steps]."""
END = 255
"""Where a block has no further step; so says every number that is no channel of the block."""
SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Rotation:
    """How the channels of a block are mixed. ``steps``: most steps of a block; 0 for the Hadamard matrix alone."""

    name: str
    steps: int = 0

    def swaps_shape(self, lead: tuple[int, ...], columns: int, size: int) -> tuple[int, ...]:
        """Shape [..., K/B, steps] of the stored channels, for leading dimensions and K columns."""
        return (*lead, columns // size, self.steps)


ROTATIONS = {r.name: r for r in (Rotation("hadamard"), Rotation("duquant", 16))}


def plain_swaps(shape: tuple[int, ...]) -> Swaps:
    """Steps that amount to the Hadamard matrix alone."""
    swaps = np.full(shape, END, dtype=np.uint8)
    swaps[..., 0] = 0
    return swaps


def rotate_reference(x: NDArray[Any], size: int, swaps: Swaps | None, inverse: bool = False) -> None:
    """x R, or x R^T, in place, for x FP32 (or FP64) [L, N, K] in blocks of ``size``; ``swaps`` [L, K/size, steps]."""
    blocks = x.reshape(*x.shape[:2], -1, size)
    with np.errstate(over="ignore", invalid="ignore"):
        if swaps is None:
            hadamard_blocks(blocks)
            return
        for matrix, steps in zip(blocks, swaps, strict=True):
            _apply_steps(matrix, steps, inverse)


def _apply_steps(matrix: NDArray[Any], steps: Swaps, inverse: bool) -> None:
    for step in reversed(range(steps.shape[-1])) if inverse else range(steps.shape[-1]):
        active = np.flatnonzero(steps[:, step] < matrix.shape[-1])
        if not len(active):
            continue
        part, channels = matrix[:, active], steps[active, step].astype(np.int64)
        if inverse:
            hadamard_blocks(part)
        _swap(part, channels)
        if not inverse:
            hadamard_blocks(part)
        matrix[:, active] = part


def _swap(part: NDArray[Any], channels: NDArray[np.int64]) -> None:
    """Exchange channel 0 of block g with ``channels[g]``; part [N, G, B]."""
    blocks = np.arange(len(channels))
    first = part[:, :, 0].copy()
    part[:, :, 0] = part[:, blocks, channels]
    part[:, blocks, channels] = first


def hadamard_blocks(x: NDArray[Any]) -> None:
    """Each run of the last axis times the normalised Hadamard matrix, in place."""
    size = x.shape[-1]
    distance = 1
    while distance < size:
        pairs = x.reshape(*x.shape[:-1], -1, 2, distance)
        total = pairs[..., 0, :] + pairs[..., 1, :]
        pairs[..., 1, :] = pairs[..., 0, :] - pairs[..., 1, :]
        pairs[..., 0, :] = total
        distance *= 2
    x *= norm(size)


def hadamard_matrix(size: int) -> NDArray[np.float64]:
    """The normalised Hadamard matrix of a size that is a power of two (Sylvester's construction); symmetric."""
    if size < 1 or size & (size - 1):
        raise FormatError(f"a Hadamard rotation needs a power of two, not blocks of {size}")
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(size))


@cache
def norm(size: int) -> np.float32:
    """1 over the root of a block's size."""
    return np.float32(1 / np.sqrt(size))


def check_swaps(swaps: Any, rotation: Rotation, shape: tuple[int, ...], size: int) -> Swaps | None:
    """Stored channels for a weight of this shape, FormatError where they do not fit; None where there are none."""
    if not rotation.steps:
        return None
    wanted = rotation.swaps_shape(shape[:-2], shape[-1], size)
    if swaps is None:
        return plain_swaps(wanted)
    steps = np.asarray(swaps)
    if steps.dtype != np.uint8 or steps.shape != wanted:
        raise FormatError(
            f"the rotation is {steps.dtype} {list(steps.shape)}, but the weight needs uint8 {list(wanted)}"
        )
    return np.array(steps, order="C")
