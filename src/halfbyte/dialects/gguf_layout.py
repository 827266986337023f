"""Unquantized weights in GGUF: under llama.cpp's names, in the types and the order of rows that it wants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from halfbyte.checkpoint import Reader, numpy_dtype
from halfbyte.dialects.capabilities import UnquantizedLayout
from halfbyte.dialects.gguf_models import Model, Place
from halfbyte.dialects.gguf_rows import RowOrder
from halfbyte.dialects.outputs import Array, OutputChunk, OutputTensor
from halfbyte.errors import PlanError
from halfbyte.models import Weight

FLOATS = ("BF16", "F16", "F32")
"""The types that unquantized weights have in GGUF files."""

FP32 = ("_norm.weight", "ffn_gate_inp.weight")
"""What llama.cpp computes in FP32 and nothing else, besides vectors and biases."""


class GgufLayout(UnquantizedLayout):
    """Unquantized weights of one model."""

    def __init__(self, model: Model, order: RowOrder) -> None:
        self.model = model
        self.order = order

    def omitted(self, weight: Weight) -> str | None:
        """Leave out buffers, which llama.cpp computes."""
        return "a buffer that llama.cpp computes itself" if weight.role == "buffer" else None

    def outputs(self, weight: Weight, outputs: list[OutputTensor]) -> list[OutputTensor]:
        """List tensors in the source's type, or FP32 where llama.cpp wants it; no value changes."""
        if weight.dtype not in FLOATS:
            raise PlanError(
                f"{weight.name} is {weight.dtype}, and GGUF models hold {', '.join(FLOATS)}; "
                "give it a rule with a format, or drop it"
            )
        axis = -1 if weight.name.endswith("_bias") else -2
        placed = []
        for place in self.model.places(weight.name):
            shape = list(weight.shape)
            rows = self.model.rows(place, shape[axis]) if len(shape) > 1 else None
            if rows:
                shape[axis] = len(range(*rows))
            wide = len(shape) < 2 or place.name.endswith(FP32) or not place.name.endswith(".weight")
            placed.append(OutputTensor(place.name, "F32" if wide else weight.dtype, tuple(shape), "values", rows=rows))
        return placed

    def write(self, outputs: Sequence[OutputTensor], values: Array, first: int) -> Iterator[OutputChunk]:
        """Cut values into the outputs' types and rows."""
        for output in outputs:
            part = values
            if output.rows is not None:
                picked = slice(*output.rows)
                part = part[..., picked] if output.name.endswith(".bias") else part[..., picked, :]
            part = np.ascontiguousarray(part.astype(numpy_dtype(output.dtype), copy=False))
            yield from self.order.place(output, part, first)

    def read(self, reader: Reader, weight: Weight, first: int, stop: int) -> Array | None:
        """Read values as the source had them, in the file's type."""
        places = self.model.places(weight.name)
        if len(places) > 1:
            parts = [reader.read(place.name, first, stop) for place in places]
            axis = -1 if weight.name.endswith("_bias") else -2
            return self._joined(places, parts, axis)
        name = places[0].name
        if not weight.shape:
            return reader.read(name)
        return self.order.take(name, weight.shape[0], partial(reader.read, name), first, stop)

    def names(self, weight: Weight) -> list[str]:
        """List the tensors as llama.cpp calls them."""
        return [place.name for place in self.model.places(weight.name)]

    def _joined(self, places: Sequence[Place], parts: Sequence[Array], axis: int) -> Array:
        shape = list(parts[0].shape)
        shape[axis] = n = sum(part.shape[axis] for part in parts)
        whole = np.empty(shape, dtype=parts[0].dtype)
        leading = np.moveaxis(whole, axis, 0)
        for place, part in zip(places, parts, strict=True):
            rows = self.model.rows(place, n)
            assert rows is not None
            leading[slice(*rows)] = np.moveaxis(part, axis, 0)
        return whole
