"""Weights that a conversion is given instead of encoding them: what training made of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.checkpoint import Inventory, Reader
from halfbyte.checkpoint.header import TensorInfo
from halfbyte.convert.transcoder import TranscodedSlice, respell
from halfbyte.errors import PlanError
from halfbyte.formats import QuantizedTensor
from halfbyte.plan.shards import Item

Read = Callable[[int, int], QuantizedTensor]
"""Leading indices (rows of a matrix) first..stop of a quantized weight."""


@dataclass(frozen=True)
class GivenTensors:
    """Codes and scales by weight name, and unquantized tensors by the name that the source's files have for them.

    Everything else comes from the plan's source.
    """

    quantized: Mapping[str, Read] = field(default_factory=dict)
    dense: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def carrier(self, unit: Sequence[Item], global_scale_inv: bool) -> GivenSlices | None:
        """What carries a unit's quantized items over; None where none of them is given.

        PlanError where only some of a fusion group are.
        """
        given = [item.weight.name in self.quantized for item in unit]
        if not any(given):
            return None
        if not all(given):
            lacking = next(item.weight.name for item, known in zip(unit, given, strict=True) if not known)
            raise PlanError(f"{lacking} shares a scale with weights that were trained, but was not; train all of them")
        return GivenSlices(self, global_scale_inv)

    def reader(self, inventory: Inventory) -> Reader:
        """A reader of the source that gives the unquantized tensors instead of those in the files."""
        return _Instead(inventory, self.dense) if self.dense else Reader(inventory)


@dataclass(frozen=True)
class GivenSlices:
    """Stands where a ``Transcoder`` does: everything is ready, and no weight is read or encoded."""

    given: GivenTensors
    global_scale_inv: bool
    ready: bool = True

    def slices(self, item: Item, first: int, stop: int) -> Iterator[tuple[int, int, TranscodedSlice | None]]:
        """Leading indices first..stop as they are given; the global scale may be spelled as its reciprocal."""
        before = self.given.quantized[item.weight.name](first, stop)
        after = respell(before, self.global_scale_inv)
        yield first, stop, TranscodedSlice(before, after, after is before)


class _Instead(Reader):
    """Reads some tensors from memory."""

    def __init__(self, inventory: Inventory, tensors: Mapping[str, NDArray[Any]]) -> None:
        super().__init__(inventory)
        self._instead = {
            name: np.ascontiguousarray(array).reshape(-1).view(np.uint8) for name, array in tensors.items()
        }

    def _fill(self, info: TensorInfo, offset: int, buffer: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        data = self._instead.get(info.name)
        if data is None:
            super()._fill(info, offset, buffer)
        else:
            first = offset - info.offset
            buffer[...] = data[first : first + buffer.nbytes]
