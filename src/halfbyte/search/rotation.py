"""Rotations of blocks of channels: x W^T = (x R) (W R)^T for orthogonal R, and large values are spread over a block.

R acts on consecutive groups of channels, one matrix for all groups [B, B] or one for each [K/B, B, B]. What a weight
gains must be undone on its input: by a rotation while the model runs, or, where the input is made by another
linear map with nothing else in between, by rotating that map's rows once (``fold_values``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfbyte.errors import FormatError

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]


def hadamard(size: int) -> Doubles:
    """The orthonormal Hadamard matrix of a size that is a power of two (Sylvester's construction); symmetric."""
    if size < 1 or size & (size - 1):
        raise FormatError(f"a Hadamard rotation needs a power of two, not blocks of {size}")
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(size))


def outlier_rotations(samples: ArrayLike, block: int = 32, steps: int = 16) -> Doubles:
    """Rotations [K/B, B, B] that spread the channels with the largest values in ``samples`` [T, K].

    The greedy construction of DuQuant (arXiv 2406.01721), one rotation per block of the format as in DuQuant++
    (arXiv 2604.17789): the channel with the largest magnitude is moved to the front, a rotation whose first row is
    uniform spreads it over the block, and so on; the product with the least largest magnitude is kept.
    """
    x = np.asarray(samples, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] % block or not len(x):
        raise FormatError(f"samples have shape {list(x.shape)}; rotations of {block} channels need [T, a multiple]")
    if not np.isfinite(x).all():
        raise FormatError("the samples hold a NaN or infinity; rotations need finite activations")
    return np.stack([_greedy(part, steps) for part in np.split(x, x.shape[1] // block, axis=1)])


def _greedy(x: Doubles, steps: int) -> Doubles:
    size = x.shape[1]
    spread = hadamard(size) if not size & (size - 1) else _uniform(size)
    best = rotation = np.eye(size)
    least = np.abs(x).max()
    for _ in range(steps):
        channel = int(np.abs(x).max(axis=0).argmax())
        swap = np.eye(size)
        swap[[0, channel]] = swap[[channel, 0]]
        step = swap @ spread
        x, rotation = x @ step, rotation @ step
        largest = np.abs(x).max()
        if largest < least:
            best, least = rotation, largest
    return best


def _uniform(size: int) -> Doubles:
    """An orthogonal matrix whose first row is uniform: a Householder reflection."""
    v = np.full(size, -1 / np.sqrt(size))
    v[0] += 1
    norm = v @ v
    return np.eye(size) - (2 / norm) * np.outer(v, v) if norm else np.eye(size)


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


def rotate_hessian(hessian: ArrayLike, rotation: ArrayLike) -> Doubles:
    """The Hessian R^T H R [K, K] of rotated inputs."""
    full = block_diagonal(rotation, np.shape(hessian)[-1])
    return np.asarray(full.T @ np.asarray(hessian, dtype=np.float64) @ full)


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
