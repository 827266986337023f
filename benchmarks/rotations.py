"""Rotations as matrices, and value channels rotated between two projections: what ``rotation.py`` measures."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from halfbyte.errors import FormatError
from halfbyte.formats.arrays import Doubles, Floats
from halfbyte.formats.rotation import Swaps, rotate_reference


def rotation_matrices(size: int, swaps: Swaps | None = None) -> Doubles:
    """The rotations [..., size, size] that steps [..., steps] stand for; without any the Hadamard matrix."""
    lead = () if swaps is None else swaps.shape[:-1]
    found = np.tile(np.eye(size), (*lead, 1, 1))
    flat = found.reshape(-1, size, size)
    rotate_reference(flat, size, None if swaps is None else swaps.reshape(len(flat), 1, -1))
    return found


def rotate_columns(weight: ArrayLike, rotation: ArrayLike) -> Floats:
    """W R for a weight [..., N, K]: for inputs x R. FP32, computed in FP64."""
    array, blocks = _blocks(weight, rotation)
    return np.asarray(np.matmul(array[..., None, :], blocks)[..., 0, :].reshape(np.shape(weight)), dtype=np.float32)


def rotate_rows(weight: ArrayLike, rotation: ArrayLike) -> Floats:
    """R^T W for a weight [..., N, K], so that its outputs y become y R; also for a bias given as [N, 1]."""
    turned = np.swapaxes(np.asarray(weight, dtype=np.float64), -1, -2)
    return np.ascontiguousarray(np.swapaxes(rotate_columns(turned, rotation), -1, -2))


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
