"""Which rotation a format in rotated space gets, and rotations as matrices: x W^T = (x R) (W R)^T for orthogonal R.

R acts on consecutive groups of channels, one matrix for all groups [B, B] or one for each [K/B, B, B]. What a weight
gains must be undone on its input: by a rotation while the model runs, or, where the input is made by another
linear map with nothing else in between, by rotating that map's rows once (``fold_values``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfbyte.errors import FormatError
from halfbyte.formats import BlockFormat, Format
from halfbyte.formats.rotation import END, ROTATIONS, Swaps, check_swaps, hadamard_blocks, rotate_reference
from halfbyte.search.encode import into_rotated_space
from halfbyte.search.hessian import checked, diagonal_blocks

_CLOSE = 1.01**2  # of mean squares

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]


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


def rotation_matrices(size: int, swaps: Swaps | None = None) -> Doubles:
    """The rotations [..., size, size] that steps [..., steps] stand for; without any the Hadamard matrix."""
    lead = () if swaps is None else swaps.shape[:-1]
    found = np.tile(np.eye(size), (*lead, 1, 1))
    flat = found.reshape(-1, size, size)
    rotate_reference(flat, size, None if swaps is None else swaps.reshape(len(flat), 1, -1))
    return found


def rotated_hessian(hessian: ArrayLike, fmt: Format, swaps: Swaps | None) -> Doubles:
    """The Hessian R^T H R [..., K, K] of inputs that a format's rotation was applied to."""
    h = checked(hessian, np.shape(hessian)[-1] if np.ndim(hessian) else 0)
    found = check_swaps(swaps, fmt.rotation, h.shape, fmt.block[1]) if fmt.rotation else None
    own = None if found is None else found.reshape(-1, *found.shape[-2:])
    for _ in range(2):  # columns, then rows
        rotate_reference(h.reshape(-1, *h.shape[-2:]), fmt.block[1], own)
        h = np.ascontiguousarray(np.swapaxes(h, -1, -2))
    return h


def in_rotated_space(weight: ArrayLike, fmt: BlockFormat, hessian: Any) -> tuple[Floats, Doubles, Swaps | None]:
    """A weight [..., N, K] and its Hessian [K, K] or [..., K, K] in the rotated space of a format, and the steps of the
    rotation, which are found from the Hessian where the format has any."""
    if not hasattr(hessian, "shape"):
        raise FormatError(f"a Hessian for {fmt.name} is rotated with the weight; give the array, not what was prepared")
    assert fmt.rotation is not None
    found = duquant_swaps(hessian, fmt.block[1], fmt.rotation.steps) if fmt.rotation.steps else None
    lead = np.shape(weight)[:-2]
    swaps = None if found is None else np.broadcast_to(found, (*lead, *found.shape[-2:]))
    turned, stored = into_rotated_space(weight, fmt, swaps)
    return turned, rotated_hessian(hessian, fmt, found), stored


def rotate_columns(weight: ArrayLike, rotation: ArrayLike) -> Floats:
    """W R for a weight [..., N, K]: for inputs x R. FP32, computed in FP64."""
    array, blocks = _blocks(weight, rotation)
    return np.asarray(np.matmul(array[..., None, :], blocks)[..., 0, :].reshape(np.shape(weight)), dtype=np.float32)


def unrotate_columns(weight: ArrayLike, rotation: ArrayLike) -> Floats:
    """The inverse of ``rotate_columns``: W R^T."""
    return rotate_columns(weight, np.swapaxes(np.asarray(rotation), -1, -2))


def rotate_rows(weight: ArrayLike, rotation: ArrayLike) -> Floats:
    """R^T W for a weight [..., N, K], so that its outputs y become y R; also for a bias given as [N, 1]."""
    turned = np.swapaxes(np.asarray(weight, dtype=np.float64), -1, -2)
    return np.ascontiguousarray(np.swapaxes(rotate_columns(turned, rotation), -1, -2))


def block_diagonal(rotation: ArrayLike, columns: int) -> Doubles:
    """Rotations of blocks as one matrix [K, K]."""
    each = np.asarray(rotation, dtype=np.float64)
    size = each.shape[-1]
    _check_rotation(each, columns)
    full = np.zeros((columns, columns))
    for i in range(columns // size):
        full[i * size : (i + 1) * size, i * size : (i + 1) * size] = each if each.ndim == 2 else each[i]
    return full


def fold_values(
    value: ArrayLike, output: ArrayLike, rotation: ArrayLike, head_size: int, bias: ArrayLike | None = None
) -> tuple[Floats, Floats, Floats | None]:
    """Rotate the channels of each head between v_proj [N_v, K] and o_proj [K', N_o]; the model computes the same.

    Attention only takes weighted sums of value vectors, which commute with a rotation within a head; with grouped
    queries the heads that share values share the rotation. ``rotation`` [B, B] with B dividing ``head_size``, or
    [N_v/B, B, B]. Returns v_proj, o_proj and the bias of v_proj. Not for attention whose output is multiplied by
    a gate before o_proj (Qwen3-Next, Qwen3.5): a gate does not commute with a rotation.
    """
    v, o = np.asarray(value, dtype=np.float64), np.asarray(output, dtype=np.float64)
    each = np.asarray(rotation, dtype=np.float64)
    size = each.shape[-1]
    rows, columns = v.shape[0], o.shape[1]
    if head_size % size or rows % head_size or columns % rows:
        raise FormatError(
            f"rotations of {size} channels do not fit heads of {head_size}, {rows} value rows and {columns} columns"
        )
    per_value = np.broadcast_to(each, (rows // size, size, size)) if each.ndim == 2 else each
    # query heads that read the same values follow one another
    by_head = per_value.reshape(rows // head_size, head_size // size, size, size)
    per_output = np.repeat(by_head, columns // rows, axis=0).reshape(-1, size, size)
    turned = None if bias is None else rotate_rows(np.asarray(bias)[:, None], per_value)[:, 0]
    return rotate_rows(v, per_value), rotate_columns(o, per_output), turned


def _check_rotation(rotation: Doubles, columns: int) -> None:
    size = rotation.shape[-1]
    counts = (columns // size,) if columns % size == 0 else ()
    if rotation.ndim not in (2, 3) or rotation.shape[-2] != size or rotation.shape[:-2] not in ((), counts):
        raise FormatError(f"rotations of shape {list(rotation.shape)} do not fit {columns} channels")
    if columns % size:
        raise FormatError(f"{columns} channels are not a multiple of the {size} that are rotated together")
    if not np.allclose(rotation @ np.swapaxes(rotation, -1, -2), np.eye(size), atol=1e-6):
        raise FormatError("a rotation must be orthogonal; rows of this one are not")


def _blocks(weight: ArrayLike, rotation: ArrayLike) -> tuple[Doubles, Any]:
    array, each = np.asarray(weight).astype(np.float64), np.asarray(rotation, dtype=np.float64)
    _check_rotation(each, array.shape[-1])
    size = each.shape[-1]
    return array.reshape(*array.shape[:-1], -1, size), each
