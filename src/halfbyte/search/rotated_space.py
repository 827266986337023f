"""Which rotation a format in rotated space gets, and the Hessian of inputs that were rotated: R^T H R.

For an orthogonal R, x W^T = (x R) (W R)^T; R acts on the consecutive blocks of the format.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from halfbyte.errors import FormatError
from halfbyte.formats import Format
from halfbyte.formats.arrays import Doubles
from halfbyte.formats.rotation import END, ROTATIONS, Swaps, check_swaps, hadamard_blocks, rotate_reference
from halfbyte.search.hessian import checked, diagonal_blocks

_CLOSE = 1.01**2  # of mean squares


def duquant_swaps(hessian: ArrayLike, size: int = 32, steps: int = ROTATIONS["duquant"].steps) -> Swaps:
    """Steps uint8 [..., K/size, steps] that spread the largest activations of each block of channels.

    ``hessian`` [..., K, K] is the sum or mean of x x^T. The greedy construction of DuQuant (arXiv 2406.01721), one
    rotation per block of the format as in DuQuant++ (arXiv 2604.17789): the channel with the largest activation is
    swapped with the block's first, the Hadamard matrix, whose first row is even, spreads it over the block, and so on;
    the product with the least largest activation is kept, or the first that comes within one per cent of it. How
    large a channel is says its root mean square, which calibrations sum up, where the papers take the maximum. A block
    without activations gets the Hadamard matrix.
    """
    blocks = diagonal_blocks(checked(hessian, np.shape(hessian)[-1] if np.ndim(hessian) else 0), size)
    x = np.array(blocks.reshape(-1, size, size))
    swaps = np.full((len(x), steps), END, dtype=np.uint8)
    largest = np.empty((steps, len(x)))
    every = np.arange(len(x))
    for step in range(steps):
        channels = np.einsum("gii->gi", x).argmax(axis=1)
        swaps[:, step] = channels
        for _ in range(2):  # columns, then rows
            first = x[:, :, 0].copy()
            x[:, :, 0] = x[every, :, channels]
            x[every, :, channels] = first
            hadamard_blocks(x)
            x = np.ascontiguousarray(np.swapaxes(x, 1, 2))
        largest[step] = np.einsum("gii->gi", x).max(axis=1)
    kept = (largest <= _CLOSE * largest.min(axis=0)).argmax(axis=0)
    swaps[np.arange(steps) > kept[:, None]] = END
    return swaps.reshape(*blocks.shape[:-2], steps)


def rotated_hessian(hessian: ArrayLike, fmt: Format, swaps: Swaps | None) -> Doubles:
    """The Hessian R^T H R [..., K, K] of inputs that a format's rotation was applied to; H itself without rotation."""
    if fmt.rotation is None:
        return np.asarray(hessian)
    h = checked(hessian, np.shape(hessian)[-1] if np.ndim(hessian) else 0)
    checked_steps = check_swaps(swaps, fmt.rotation, h.shape, fmt.block[1])
    steps = None if checked_steps is None else checked_steps.reshape(-1, *checked_steps.shape[-2:])
    for _ in range(2):  # columns, then rows
        rotate_reference(h.reshape(-1, *h.shape[-2:]), fmt.block[1], steps)
        h = np.ascontiguousarray(np.swapaxes(h, -1, -2))
    return h


def hessian_in_block_space(hessian: Any, fmt: Format, lead: tuple[int, ...]) -> tuple[Any, Swaps | None]:
    """A Hessian as the format's blocks see the inputs, and the steps of the rotation for a weight [*lead, N, K].

    Outside rotated space that is the Hessian itself. DuQuant's steps are found from it; None: there are none.
    """
    if fmt.rotation is None:
        return hessian, None
    if not hasattr(hessian, "shape"):
        raise FormatError(f"a Hessian for {fmt.name} is rotated with the weight; give the array, not what was prepared")
    steps = duquant_swaps(hessian, fmt.block[1], fmt.rotation.steps) if fmt.rotation.steps else None
    rotated = rotated_hessian(hessian, fmt, steps)
    return rotated, None if steps is None else np.broadcast_to(steps, (*lead, *steps.shape[-2:]))
