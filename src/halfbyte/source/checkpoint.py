"""A checkpoint as weights, whatever dialect its files are written in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.checkpoint import Inventory, Reader, TensorInfo, itemsize, numpy_dtype
from halfbyte.checkpoint.files import collector_paused
from halfbyte.dialects import Dialect, OutputTensor, UnequalScalesError, list_dialects
from halfbyte.errors import CheckpointError
from halfbyte.formats import Format, QuantizedTensor
from halfbyte.models import Family, Piece, Weight, family_for

Array = NDArray[Any]
FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass
class _Dense:
    """The part of an inventory that families look at."""

    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]


class Checkpoint:
    """Weights of a checkpoint with roles and, where they are quantized, formats.

    ``dialect`` is None for a plain checkpoint. Reading gives dense arrays or, for quantized weights,
    QuantizedTensor; leading indices (experts) and rows can be read in slices.
    """

    @collector_paused()
    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        dialect = next((d for d in list_dialects() if d.claims(inventory)), None)
        self.dialect: Dialect | None = dialect.for_model(inventory) if dialect else None
        tensors: Mapping[str, TensorInfo] = inventory.tensors
        by_tensor: dict[str, Format] = {}
        if self.dialect is not None:
            tensors, by_tensor = self.dialect.spelling.dense(inventory)
        self.family: Family = family_for(inventory.config, list(tensors))
        self.weights: list[Weight] = self.family.weights(_Dense(tensors, inventory.config))
        self.formats: dict[str, Format] = {}
        self._stored: dict[str, list[OutputTensor]] = {}
        for weight in self.weights if by_tensor else ():
            formats = {by_tensor.get(source) for source in weight.sources}
            if len(formats) > 1:
                raise CheckpointError(
                    f"the tensors of {weight.name} in {inventory.source} have different formats; "
                    "it cannot be read as one weight"
                )
            fmt = formats.pop()
            if fmt is not None:
                self.formats[weight.name] = fmt
        transposed = {w.name: w for w in self.weights if w.transposed and w.name in self.formats}
        # quantized stacks that lie as [E, K, N] in the files too
        self._stored_transposed = transposed if self.dialect and self.dialect.spelling.transposed_stacks else {}
        if transposed and not self._stored_transposed:
            self.weights = [replace(w, transposed=False) if w.name in self.formats else w for w in self.weights]

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> Checkpoint:
        """Open a folder, a file or a hub id."""
        return cls(Inventory.open(source, revision))

    def stored(self, weight: Weight) -> list[OutputTensor]:
        """The tensors that hold a quantized weight, as its files have them.

        CheckpointError if one is missing or has another shape.
        """
        if weight.name in self._stored:
            return self._stored[weight.name]
        assert self.dialect is not None
        tensors = self.inventory.tensors
        weight = self._stored_transposed.get(weight.name, weight)
        outputs = self.dialect.spelling.stored(weight, self.formats[weight.name], tensors)
        for i, output in enumerate(outputs):
            info = tensors.get(output.name)
            if info is None:
                raise CheckpointError(
                    f"{self.inventory.source} lacks the tensor {output.name}; the checkpoint is incomplete"
                )
            if info.shape != output.shape or info.dtype != output.dtype:
                if not _agree(info, output, len(weight.shape) > 2):
                    raise CheckpointError(
                        f"{output.name} in {self.inventory.source} has type {info.dtype} and shape "
                        f"{list(info.shape)}, but its weight needs {list(output.shape)} of {output.dtype}; "
                        "the checkpoint is damaged"
                    )
                outputs[i] = output._replace(dtype=info.dtype, shape=info.shape)
        self._stored[weight.name] = outputs
        return outputs

    def tensors_of(self, weight: Weight) -> list[str]:
        """Names of the files' tensors that hold a weight, those of its scales included."""
        if weight.name in self.formats:
            return [output.name for output in self.stored(weight)]
        return self.dialect.unquantized.names(weight) if self.dialect else list(weight.sources)

    def read(self, reader: Reader, weight: Weight, first: int = 0, stop: int | None = None) -> Array:
        """Leading indices first..stop of a weight, dense: stored dtype, or FP32 where it is quantized.

        For a weight of two or fewer dimensions first..stop are rows; of a quantized one, whole blocks of rows.
        """
        if weight.name not in self.formats:
            end = (weight.shape[0] if weight.shape else 0) if stop is None else stop
            values = self.dialect.unquantized.read(reader, weight, first, end) if self.dialect else None
            return read_dense(reader, weight, first, stop) if values is None else values
        try:
            return self.read_quantized(reader, weight, first, stop).decode()
        except UnequalScalesError:
            return self._read_projections(reader, weight, first, weight.shape[0] if stop is None else stop)

    def read_quantized(
        self, reader: Reader, weight: Weight, first: int = 0, stop: int | None = None
    ) -> QuantizedTensor:
        """Leading indices first..stop of a quantized stack, or rows (whole blocks of them) of a quantized matrix.

        UnequalScalesError where the projections of a stack have a global scale each; ``read`` gives their values.
        """
        transposed = self._stored_transposed.get(weight.name)
        tensor = self._assemble(reader, transposed or weight, self.stored(weight), first, stop)
        return _transposed(tensor) if transposed else tensor

    def _assemble(
        self, reader: Reader, weight: Weight, stored: Sequence[OutputTensor], first: int, stop: int | None
    ) -> QuantizedTensor:
        assert self.dialect is not None
        stacked = len(weight.shape) > 2

        def fetch(output: OutputTensor, begin: int, until: int) -> Array:
            per = 1 if stacked else output.rows_per_row
            if output.expert is not None or not per or not output.shape:
                return reader.read(output.name)
            return reader.read(output.name, begin // per, -(-until // per))

        end = weight.shape[0] if stop is None else stop
        if stacked and stored[0].expert is not None:
            each = len(stored) // weight.shape[0]
            stored = stored[first * each : end * each]
        return self.dialect.spelling.assemble(weight, self.formats[weight.name], stored, fetch, first, end)

    def _read_projections(self, reader: Reader, weight: Weight, first: int, stop: int) -> Array:
        """Experts first..stop in FP32, each of their projections decoded by itself."""
        stored, count = self.stored(weight), len(weight.row_parts)
        each = len(stored) // (count * (1 if stored[0].expert is None else weight.shape[0]))
        values = np.empty((stop - first, *weight.shape[1:]), dtype=np.float32)
        for i, (_, begin, until) in enumerate(weight.row_parts):
            part = replace(weight, shape=(weight.shape[0], until - begin, weight.shape[2]), row_parts=())
            outputs = [o._replace(rows=None) for k, o in enumerate(stored) if k // each % count == i]
            rows = slice(i, None, count) if weight.interleaved else slice(begin, until)
            values[:, rows] = self._assemble(reader, part, outputs, first, stop).decode()
        return values


def _transposed(tensor: QuantizedTensor) -> QuantizedTensor:
    """[E, N, K] of a stack that was read as [E, K, N]; its blocks are square."""
    codes, scales = (np.ascontiguousarray(np.swapaxes(a, 1, 2)) for a in (tensor.codes, tensor.scales))
    experts, columns, rows = tensor.shape
    return replace(tensor, shape=(experts, rows, columns), codes=codes, scales=scales)


def _agree(info: TensorInfo, output: OutputTensor, stacked: bool) -> bool:
    """Whether a file's tensor is another spelling of the expected one: dimensions of 1, types of wide scales."""
    if [n for n in info.shape if n != 1] != [n for n in output.shape if n != 1]:
        return False
    in_slices = output.expert is None and (stacked or output.rows_per_row) and math.prod(output.shape) > 1
    if in_slices and info.shape[:1] != output.shape[:1]:
        return False
    # not F64, whose values no output would hold
    wide = output.dtype in FLOATS and info.dtype in ("F32", "F16", "BF16", "F8_E8M0")
    return wide or output.constant is not None or itemsize(info.dtype) == itemsize(output.dtype)


def read_dense(reader: Reader, weight: Weight, first: int = 0, stop: int | None = None) -> Array:
    """Leading indices first..stop of a weight that lies in the file unquantized, in its stored dtype."""
    if not weight.shape or weight.pieces[0].expert is None:
        array = reader.read(weight.pieces[0].source, *((first, stop) if weight.shape else ()))
        return np.ascontiguousarray(np.swapaxes(array, -1, -2)) if weight.transposed else array
    end = weight.shape[0] if stop is None else stop
    pieces = list(pieces_of(weight, first, end))
    dtype = numpy_dtype(reader.inventory.tensors[pieces[0].source].dtype)
    array = np.empty((end - first, *weight.shape[1:]), dtype=dtype)
    for piece in pieces:
        assert piece.expert is not None
        begin, until = piece.rows or (0, weight.shape[-2])
        reader.read_into(piece.source, array[piece.expert - first, begin:until])
    return array


def pieces_of(weight: Weight, first: int, stop: int) -> Iterator[Piece]:
    """The pieces of a gathered weight that fill leading indices first..stop."""
    return (p for p in weight.pieces if p.expert is not None and first <= p.expert < stop)
