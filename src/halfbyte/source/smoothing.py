"""AWQ smoothing of a whole checkpoint: scales are chosen once, stored beside the weights, applied slice by slice.

``halfbyte_folds.st`` (a safetensors file under a name that engines do not take for weights) holds per smoothed group
the scale FP32 [K], or [E, K] where experts have their own; all ones where smoothing does not pay. Its norm is divided
by it and rounded, and the columns of all that reads the norm are multiplied by what the rounded norm amounts to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.checkpoint import Layout, Reader, build_header, nbytes
from halfbyte.checkpoint.files import read_small
from halfbyte.checkpoint.header import read_header
from halfbyte.errors import CheckpointError
from halfbyte.formats.arrays import Floats
from halfbyte.models import Piece, Weight
from halfbyte.models.smoothing_groups import SmoothingGroup
from halfbyte.search.awq import smooth_norm
from halfbyte.source.checkpoint import Checkpoint

Array = NDArray[Any]
SMOOTHING_FILE = "halfbyte_folds.st"
_KIND = {"format": "halfbyte-folds", "version": "1"}


@dataclass
class Smoothing:
    """What smoothing makes of one weight: columns are multiplied, then rows divided; a norm has new ``values``.

    ``columns`` FP32 [K] or [E, K]; ``rows`` FP32 [N] or [E, N], ones for rows that stay.
    """

    columns: Floats | None = None
    rows: Floats | None = None
    values: Array | None = None

    def apply(self, array: Array, first: int = 0) -> Array:
        """Leading indices (experts, rows, or elements of a vector) from ``first`` on, smoothed, in FP32 or wider."""
        if self.values is not None:
            return self.values[first : first + len(array)]
        wide = array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32)
        if self.columns is not None:
            shared = self.columns.ndim == 1
            wide *= (self.columns if shared else self.columns[first : first + len(array)])[..., None, :]
        if self.rows is not None:
            rows = self.rows[first : first + len(array)]
            wide /= rows[..., None] if array.ndim > rows.ndim else rows
        return wide

    def apply_rounded(self, array: Array, first: int = 0) -> Array:
        """Apply in the type of ``array``: what becomes of a weight that is not quantized."""
        with np.errstate(over="ignore"):
            return self.apply(array, first).astype(array.dtype)

    def part(self, piece: Piece) -> Smoothing:
        """The smoothing of one expert's projection, where a stack lies in many tensors."""
        if piece.expert is None:
            return self
        columns, rows = self.columns, self.rows
        if columns is not None and columns.ndim > 1:
            columns = columns[piece.expert]
        if rows is not None:
            rows = rows[piece.expert][slice(*piece.rows) if piece.rows else slice(None)]
        return Smoothing(columns, rows)


def layout(groups: Sequence[SmoothingGroup]) -> Layout:
    """The planned file of scales."""
    return build_header([(group.name, "F32", _shape(group)) for group in groups], _KIND)


def read_scales(path: Path) -> dict[str, Floats]:
    """The scales of a file, by group; CheckpointError where it is damaged."""
    tensors, metadata, size = read_header(path, path.name)
    if {key: metadata.get(key) for key in _KIND} != _KIND:
        raise CheckpointError(f"{path.name} is not the file of scales that this release writes")
    data, scales = read_small(path, size), {}
    for tensor in tensors:
        if tensor.dtype != "F32":
            raise CheckpointError(f"{tensor.name} in {path.name} is {tensor.dtype}, not F32")
        raw = data[tensor.offset : tensor.offset + tensor.nbytes]
        scales[tensor.name] = scale = np.frombuffer(raw, "<f4").reshape(tensor.shape)
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise CheckpointError(f"{tensor.name} in {path.name} holds a scale that is not finite and positive")
    return scales


def make_smoothings(
    checkpoint: Checkpoint, reader: Reader, groups: Sequence[SmoothingGroup], scales: Mapping[str, Floats]
) -> dict[str, Smoothing]:
    """What the scales make of every weight, by name. CheckpointError where they do not fit their groups."""
    smoothings: dict[str, Smoothing] = {}
    for group in groups:
        scale = scales.get(group.name)
        if scale is None or scale.shape != _shape(group):
            held = "no scale" if scale is None else f"a scale of shape {list(scale.shape)}"
            raise CheckpointError(f"{SMOOTHING_FILE} has {held} for {group.name}, which needs {list(_shape(group))}")
        if (scale == 1).all():
            continue
        first = group.producers[0]
        if first.kind != "rows":
            norm = checkpoint.read(reader, first.weight)
            values, scale = smooth_norm(norm, scale, first.kind == "zero_centred")
            smoothings[first.weight.name] = Smoothing(values=values)
        for producer in group.producers[first.kind != "rows" :]:
            count = producer.weight.shape[0]
            if producer.kind == "rows":
                count = producer.weight.shape[-1 if producer.weight.transposed else -2]
            rows = np.ones((*scale.shape[:-1], count), np.float32)
            rows[..., slice(*producer.rows) if producer.rows else slice(None)] = scale
            smoothings.setdefault(producer.weight.name, Smoothing()).rows = rows
        for weight in group.consumers:
            smoothings.setdefault(weight.name, Smoothing()).columns = scale
    return smoothings


def resmoothed(
    checkpoint: Checkpoint, reader: Reader, weight: Weight, smoothing: Smoothing, size: int, names: set[str]
) -> Iterator[tuple[str, int, Array]]:
    """A kept weight's source tensors ``names`` after smoothing, in their own dtype: (name, first leading index, part).

    Parts have about ``size`` bytes; how large they are changes no bit of them.
    """
    for piece in weight.pieces:
        if piece.source not in names:
            continue
        info, of_piece = checkpoint.inventory.tensors[piece.source], smoothing.part(piece)
        transposed = weight.transposed and piece.expert is None
        step = max(1, size // max(nbytes(info.dtype, info.shape[1:]), 1))
        for first in range(0, info.shape[0], step):
            array = reader.read(piece.source, first, min(first + step, info.shape[0]))
            stored = of_piece.apply_rounded(np.swapaxes(array, -1, -2) if transposed else array, first)
            yield piece.source, first, np.ascontiguousarray(np.swapaxes(stored, -1, -2) if transposed else stored)


def _shape(group: SmoothingGroup) -> tuple[int, ...]:
    return (group.channels,) if group.experts is None else (group.experts, group.channels)
