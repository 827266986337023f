"""GGUF files read back: weights under the names, in the order and in the shapes of their source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from halfbyte.checkpoint import Inventory, Reader, TensorInfo
from halfbyte.dialects.dialect import Dialect
from halfbyte.dialects.gguf_blocks import BLOCKS, FORMATS, row_bytes, unpack_blocks
from halfbyte.dialects.gguf_models import Model, Place
from halfbyte.dialects.outputs import Array, OutputTensor
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.formats import BlockFormat, Format, QuantizedTensor, get_format
from halfbyte.models import Weight

FLOATS = ("BF16", "F16", "F32")


class GgufBase(Dialect):
    """What holds for every model."""

    name = "gguf"
    about = "llama.cpp: one file with configuration and tokenizer"
    standalone = True

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Formats that are no ggml type."""
        if fmt.name in BLOCKS:
            return None
        return f"llama.cpp has no type for {fmt.name}; the dialect gguf holds {', '.join(BLOCKS)}, or the weight kept"

    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """Needs the model."""
        raise PlanError("the dialect gguf names tensors by the model's architecture; bind it with for_model")

    def pack(self, output: OutputTensor, part: Array, fmt: Format) -> Array:
        """Codes and scales lie in one tensor; see ``write``."""
        raise TypeError("codes and scales of GGUF lie in one tensor, which write packs")

    def unpack(self, output: OutputTensor, stored: Array, fmt: Format, shape: tuple[int, ...]) -> Array:
        """Codes and scales lie in one tensor; see ``assemble``."""
        raise TypeError("codes and scales of GGUF lie in one tensor, which assemble unpacks")

    def config(self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight]) -> dict[str, Any]:
        """The types stand in the file."""
        return {}

    def claims(self, inventory: Inventory) -> bool:
        """By the types that only GGUF files have."""
        return bool(inventory.ggml_types)

    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """Needs the model."""
        raise PlanError("the dialect gguf names tensors by the model's architecture; bind it with for_model")


@dataclass(eq=False, repr=False)
class GgufReading(GgufBase):
    """GGUF of one model, from the files' side. ``heads``: of attention, for queries and for keys."""

    inventory: Inventory
    model: Model
    heads: tuple[int, int]

    def head(self, name: str, rows: int) -> int:
        """Rows of a head of a tensor whose rows llama.cpp has in another order, else 0."""
        if self.model.rotated:
            for part, count in zip((".attn_q.", ".attn_k."), self.heads, strict=True):
                if part in name:
                    return rows // count
        return 0

    def stored(self, weight: Weight, fmt: Format, tensors: Any) -> list[OutputTensor]:
        """The converter of llama.cpp leaves global scales of 1 out."""
        return [o for o in self.outputs(weight, fmt) if o.part == "blocks" or o.name in tensors]

    def kept_names(self, weight: Weight) -> list[str]:
        """As llama.cpp calls them."""
        return [place.name for place in self.model.places(weight.name)]

    def assemble(
        self,
        weight: Weight,
        fmt: Format,
        outputs: Sequence[OutputTensor],
        read: Callable[[OutputTensor, int, int], Array],
        first: int,
        stop: int,
    ) -> QuantizedTensor:
        """Codes, scales and global scales of leading indices (or rows) first..stop."""
        shape = (stop - first, *weight.shape[1:])
        blocks = np.empty((*shape[:-1], row_bytes(fmt, shape[-1])), dtype=np.uint8)
        lead = shape[:-2]
        scale: Array | None = None
        for output in outputs:
            if output.part == "global_scale":
                found = read(output, first, stop).reshape(lead)
                if scale is not None and not np.array_equal(found, scale):
                    raise CheckpointError(f"{output.name} differs from the scale of the gate rows; this is not read")
                scale = found
            elif output.rows is None:
                blocks[...] = self._unplaced(output.name, output.shape[0], partial(read, output), first, stop)
            else:
                blocks[..., slice(*output.rows), :] = read(output, first, stop)
        if scale is None and scaled(fmt):
            scale = np.ones(lead, dtype=np.float32)
        codes, scales = unpack_blocks(blocks, fmt, shape)
        return QuantizedTensor(fmt, shape, codes, scales, scale)

    def _unplaced(self, name: str, rows: int, read: Callable[[int, int], Array], first: int, stop: int) -> Array:
        """The inverse of ``_placed``: whole heads are read and turned back."""
        head = self.head(name, rows)
        if not head:
            return read(first, stop)
        begin, end = first // head * head, -(-stop // head) * head
        return read(begin, end)[rotated(np.arange(first, stop), head) - begin]

    def read_kept(self, reader: Reader, weight: Weight, first: int, stop: int) -> Array | None:
        """Values as the source had them, in the file's type."""
        places = self.model.places(weight.name)
        if len(places) > 1:
            parts = [reader.read(place.name, first, stop) for place in places]
            axis = -1 if weight.name.endswith("_bias") else -2
            return self._joined(places, parts, axis)
        name = places[0].name
        if not weight.shape:
            return reader.read(name)
        return self._unplaced(name, weight.shape[0], partial(reader.read, name), first, stop)

    def _joined(self, places: Sequence[Place], parts: Sequence[Array], axis: int) -> Array:
        shape = list(parts[0].shape)
        shape[axis] = n = sum(part.shape[axis] for part in parts)
        whole = np.empty(shape, dtype=parts[0].dtype)
        upright = np.moveaxis(whole, axis, 0)
        for place, part in zip(places, parts, strict=True):
            rows = self.model.rows(place, n)
            assert rows is not None
            upright[slice(*rows)] = np.moveaxis(part, axis, 0)
        return whole

    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """The weights under the names of their source."""
        found = inventory.tensors
        tensors: dict[str, TensorInfo] = {}
        formats: dict[str, Format] = {}
        # made by the writer from the configuration, not a weight
        seen = {"rope_freqs.weight"}
        for name in self.model.weights(int(inventory.config["num_hidden_layers"])):
            places = [place.name for place in self.model.places(name)]
            if not any(place in found for place in places):
                continue
            missing = next((place for place in places if place not in found), None)
            if missing:
                raise CheckpointError(f"{inventory.source} lacks the tensor {missing}")
            parts = [found[place] for place in places]
            shape = list(parts[0].shape)
            if len(parts) > 1:
                axis = -1 if name.endswith("_bias") else -2
                shape[axis] = sum(part.shape[axis] for part in parts)
            dtype = parts[0].dtype
            fmt = self._format(inventory, places)
            if fmt is not None:
                formats[name] = fmt
                block = BLOCKS[fmt.name]
                shape[-1] = shape[-1] // block.nbytes * block.weights
                dtype = "BF16"
                seen.update(map(scale_name, places))
            seen.update(places)
            size = sum(part.nbytes for part in parts)
            tensors[name] = TensorInfo(name, dtype, tuple(shape), parts[0].file, parts[0].offset, size)
        strange = next((name for name in found if name not in seen), None)
        if strange:
            raise CheckpointError(f"{strange} in {inventory.source} belongs to no weight of a {self.model.name} model")
        return tensors, formats

    def _format(self, inventory: Inventory, places: Sequence[str]) -> Format | None:
        """The format of a weight's tensors, None where they are not quantized."""
        kinds = [inventory.ggml_types[place] for place in places]
        if len(set(kinds)) > 1:
            raise CheckpointError(
                f"{places[0]} is {kinds[0]} and {places[1]} {kinds[1]}; this is not read as one weight"
            )
        if kinds[0] in FLOATS:
            return None
        if kinds[0] not in FORMATS:
            raise CheckpointError(
                f"{places[0]} in {inventory.source} is {kinds[0]}, which is not read; known are {', '.join(FORMATS)}"
            )
        if kinds[0] == "NVFP4" and not any(scale_name(place) in inventory.tensors for place in places):
            return get_format("nvfp4_unscaled")
        return get_format(FORMATS[kinds[0]])


def scale_name(name: str) -> str:
    """The tensor with the global scale of a weight."""
    return f"{name.removesuffix('weight')}scale"


def rotated(rows: Array, head: int) -> Array:
    """Where rows of q or k lie in llama.cpp's order: the first and the second half of a head alternate."""
    within = rows % head
    return rows - within + within % (head // 2) * 2 + within // (head // 2)


def scaled(fmt: Format) -> bool:
    """Whether a format has a global scale."""
    return isinstance(fmt, BlockFormat) and fmt.has_global_scale
