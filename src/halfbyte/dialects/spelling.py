"""How an engine's files hold quantized weights: the tensors of each, from the arrays in memory and back to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from halfbyte.checkpoint import Inventory, TensorInfo, numpy_dtype
from halfbyte.dialects.outputs import Array, OutputChunk, OutputTensor, UnequalScalesError
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.formats import Format, QuantizedTensor
from halfbyte.models import Weight


class Spelling(ABC):
    """The tensors that hold a quantized weight.

    ``global_scale_inv``: global scales are stored as reciprocals, and the stored number is the exact one.
    ``power_of_two``: only powers of two are stored exactly as global scales.
    ``transposed_stacks``: stacks of experts lie as [E, K, N] where the family's unquantized ones do; else all of them
    lie as [E, N, K].
    """

    global_scale_inv: bool = False
    power_of_two: bool = False
    transposed_stacks: bool = False

    @abstractmethod
    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Say why this spelling cannot hold a weight in a format; None if it can."""

    def shape_problem(self, weight: Weight, fmt: Format) -> str | None:
        """Say why a weight's shape does not fit the packing of a format, like ``Format.problem``; None if it fits."""
        return None

    def format_for(self, weight: Weight, fmt: Format) -> Format:
        """Return the format that replaces ``fmt`` where engines have no room for all of its parts."""
        return fmt

    @abstractmethod
    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """List the tensors that hold a quantized weight, in file order."""

    def stored(self, weight: Weight, fmt: Format, tensors: Mapping[str, TensorInfo]) -> list[OutputTensor]:
        """List the tensors of an existing checkpoint that hold a weight, where files spell it in more than one way."""
        return self.outputs(weight, fmt)

    def pack(self, output: OutputTensor, part: Array, fmt: Format) -> Array:
        """Turn an array of a quantized tensor (rows and experts already selected) into what is stored."""
        return part

    def unpack(self, output: OutputTensor, stored: Array, fmt: Format, shape: tuple[int, ...]) -> Array:
        """Turn what is stored into an array of a quantized tensor, of this shape: the inverse of ``pack``."""
        return stored.reshape(shape)

    @abstractmethod
    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """Return a quantized checkpoint's tensors as if they were dense, and the format of each quantized one.

        Keys are the names that the weights have in a source checkpoint (before experts are gathered).
        """

    def write(
        self, outputs: Sequence[OutputTensor], fmt: Format, tensor: QuantizedTensor, expert: int, row: int
    ) -> Iterator[OutputChunk]:
        """Cut a quantized slice of a weight into stored arrays.

        ``tensor`` holds leading indices from ``expert`` on (for stacks) and rows from ``row`` on.
        """
        stacked = len(tensor.shape) > 2
        count = tensor.shape[0] if stacked else 1
        for output in outputs:
            if output.expert is not None and not expert <= output.expert < expert + count:
                continue
            if output.constant is not None:
                yield OutputChunk(output, 0, np.array(output.constant, dtype=numpy_dtype(output.dtype)))
                continue
            packed = self.pack(output, _selected(output, fmt, tensor, expert), fmt)
            start = 0
            if output.expert is None and stacked:
                start = expert * (packed.size // count)
            elif row and output.rows_per_row:
                start = row // output.rows_per_row * packed.shape[-1]
            yield OutputChunk(output, start, packed)

    def assemble(
        self,
        weight: Weight,
        fmt: Format,
        outputs: Sequence[OutputTensor],
        read: Callable[[OutputTensor, int, int], Array],
        first: int,
        stop: int,
    ) -> QuantizedTensor:
        """Read leading indices (or rows) first..stop of a weight; ``read(output, first, stop)`` gives stored arrays.

        Rows must begin and end at blocks. UnequalScalesError where fused projections have a scale each.
        """
        shape = (stop - first, *weight.shape[1:])
        arrays: dict[str, Array] = {}
        shared: dict[tuple[str, int | None], bytes] = {}
        wanted = fmt.parts(shape)
        for output in outputs:
            if output.part not in wanted or (output.expert is not None and not first <= output.expert < stop):
                continue
            stored = read(output, first, stop)
            kind, dims = wanted[output.part]
            wide = np.dtype(kind).itemsize > 1
            if wide and stored.dtype.itemsize == 1:
                stored = stored.astype(np.float32)  # E8M0, whose powers of two are exact
            if output.part not in arrays:
                # wide scales keep the type that the file has: an FP32 scale is not rounded to BF16
                arrays[output.part] = np.empty(dims, stored.dtype if wide else kind)
            target = arrays[output.part]
            if wide and target.dtype != stored.dtype:
                raise CheckpointError(f"{output.name} is {stored.dtype}, but others of its kind are {target.dtype}")
            if output.expert is not None:
                target = target[output.expert - first : output.expert - first + 1]
            if output.rows is not None:
                target = target[:, _region(output.rows, output.part, fmt)]
            target[...] = self.unpack(output, stored, fmt, target.shape)
            # fused projections share their scale here, as in the engines
            if not output.rows_per_row:
                content = stored.tobytes()
                if shared.setdefault((output.part, output.expert), content) != content:
                    raise UnequalScalesError(f"{output.name} differs from the scale of the projection it is fused with")
        tensor = QuantizedTensor(fmt, shape, **arrays)
        if self.global_scale_inv and tensor.global_scale is not None:
            tensor.global_scale_inv = tensor.global_scale
            tensor.global_scale = np.asarray(np.float32(1) / tensor.global_scale_inv)
        return tensor


def check_codes(info: TensorInfo, source: str) -> None:
    """CheckpointError for codes that are no matrix and no stack of matrices."""
    if len(info.shape) not in (2, 3):
        raise CheckpointError(
            f"{info.name} in {source} holds codes of shape {list(info.shape)}, but a quantized weight has two or three "
            "dimensions; the checkpoint is damaged"
        )


def _selected(output: OutputTensor, fmt: Format, tensor: QuantizedTensor, expert: int) -> Array:
    """Select the experts and rows that an output holds of a tensor's array, in the type that it is stored in."""
    array = _array(tensor, output.part)
    if output.expert is not None:
        array = array[output.expert - expert]
    if output.rows is not None:
        region = _region(output.rows, output.part, fmt)
        array = array[:, region] if len(tensor.shape) > 2 and output.expert is None else array[region]
    if array.dtype.itemsize > 1:
        # the plan chose a type that rounds no scale
        array = array.astype(numpy_dtype(output.dtype), copy=False)
    return array


def _array(tensor: QuantizedTensor, part: str) -> Array:
    if part == "global_scale" and tensor.global_scale_inv is not None:
        return tensor.global_scale_inv
    array = getattr(tensor, part)
    if array is None:
        raise PlanError(f"format {tensor.format.name} has no array {part!r}, which the dialect wants to write")
    return np.asarray(array)


def _region(rows: tuple[int, int, int], part: str, fmt: Format) -> slice:
    """Map rows (first, stop, step) of a weight to those of an array of its QuantizedTensor."""
    first, stop, step = rows
    per_scale = fmt.block[0] if part == "scales" else 1
    return slice(first // per_scale, -(-stop // per_scale), step)
