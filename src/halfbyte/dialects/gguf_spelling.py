"""Quantized weights in GGUF: codes and scales of a weight in one tensor of blocks, its global scale in another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from halfbyte.checkpoint import Inventory, TensorInfo
from halfbyte.checkpoint.foreign import Fields
from halfbyte.dialects.gguf_blocks import BLOCKS, FORMATS, pack_blocks, row_bytes, unpack_blocks
from halfbyte.dialects.gguf_layout import FLOATS, FP32
from halfbyte.dialects.gguf_models import Model
from halfbyte.dialects.gguf_rows import RowOrder
from halfbyte.dialects.outputs import Array, OutputChunk, OutputTensor
from halfbyte.dialects.spelling import Spelling
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.formats import Format, QuantizedTensor, get_format
from halfbyte.models import Weight

_UNBOUND = "the dialect gguf names tensors by the model's architecture; bind it with for_model"


class GgufSpelling(Spelling):
    """Blocks of any model; tensors have names only in ``GgufModelSpelling``."""

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Refuse formats that are no ggml type."""
        if fmt.name in BLOCKS:
            return None
        return f"llama.cpp has no type for {fmt.name}; the dialect gguf holds {', '.join(BLOCKS)}, or the weight kept"

    def shape_problem(self, weight: Weight, fmt: Format) -> str | None:
        """Refuse rows that are no whole blocks: those of NVFP4 come in fours."""
        block = BLOCKS.get(fmt.name)
        if block and weight.shape[-1] % block.weights:
            return f"K = {weight.shape[-1]} is not a multiple of the {block.weights} weights of a block in GGUF"
        return None

    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """Raise PlanError: names need the model."""
        raise PlanError(_UNBOUND)

    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """Raise PlanError: names need the model."""
        raise PlanError(_UNBOUND)


class GgufModelSpelling(GgufSpelling):
    """Blocks under the names, and in the order of rows, of one model."""

    def __init__(self, model: Model, order: RowOrder) -> None:
        self.model = model
        self.order = order

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Refuse what is no ggml type, and what llama.cpp reads in FP32 or without a global scale."""
        unknown = super().problem(weight, fmt)
        if unknown:
            return unknown
        names = [place.name for place in self.model.places(weight.name)]
        if len(weight.shape) < 2 or names[0].endswith(FP32):
            return f"llama.cpp reads {names[0]} in FP32; keep it"
        if fmt.has_global_scale and names[0].split(".")[-2] in self.model.unscaled:
            return (
                f"llama.cpp's {self.model.name} applies no global scale to {names[0]}; choose a format without one, "
                "such as mxfp4, q8_0 or nvfp4_unscaled"
            )
        return self.shape_problem(weight, fmt)

    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """List the blocks and, where the format has one, the global scale."""
        outputs = []
        *lead, n, k = weight.shape
        for place in self.model.places(weight.name):
            rows = self.model.rows(place, n)
            shape = (*lead, len(range(*rows)) if rows else n, row_bytes(fmt, k))
            outputs.append(OutputTensor(place.name, "U8", shape, "blocks", rows=rows))
            if fmt.has_global_scale:
                shape = tuple(lead) or (1,)
                outputs.append(OutputTensor(scale_name(place.name), "F32", shape, "global_scale", rows_per_row=0))
        return outputs

    def stored(self, weight: Weight, fmt: Format, tensors: Mapping[str, TensorInfo]) -> list[OutputTensor]:
        """Leave out global scales that a file lacks: the converter of llama.cpp does not write those of 1."""
        return [o for o in self.outputs(weight, fmt) if o.part == "blocks" or o.name in tensors]

    def write(
        self, outputs: Sequence[OutputTensor], fmt: Format, tensor: QuantizedTensor, expert: int, row: int
    ) -> Iterator[OutputChunk]:
        """Cut a quantized slice into blocks and global scales."""
        blocks = pack_blocks(tensor)
        for output in outputs:
            if output.part == "global_scale":
                assert tensor.global_scale is not None
                yield OutputChunk(output, expert, np.atleast_1d(tensor.global_scale))
            else:
                part = blocks if output.rows is None else blocks[..., slice(*output.rows), :]
                yield from self.order.place(
                    output, np.ascontiguousarray(part), expert if len(tensor.shape) > 2 else row
                )

    def assemble(
        self,
        weight: Weight,
        fmt: Format,
        outputs: Sequence[OutputTensor],
        read: Callable[[OutputTensor, int, int], Array],
        first: int,
        stop: int,
    ) -> QuantizedTensor:
        """Read codes, scales and global scales of leading indices (or rows) first..stop."""
        shape = (stop - first, *weight.shape[1:])
        blocks = np.empty((*shape[:-1], row_bytes(fmt, shape[-1])), dtype=np.uint8)
        lead = shape[:-2]
        scale: Array | None = None
        for output in outputs:
            if output.part == "global_scale":
                part = read(output, first, stop).reshape(lead)
                if scale is not None and not np.array_equal(part, scale):
                    raise CheckpointError(f"{output.name} differs from the scale of the gate rows; this is not read")
                scale = part
            elif output.rows is None:
                blocks[...] = self.order.take(output.name, output.shape[0], partial(read, output), first, stop)
            else:
                blocks[..., slice(*output.rows), :] = read(output, first, stop)
        if scale is None and fmt.has_global_scale:
            scale = np.ones(lead, dtype=np.float32)
        codes, scales = unpack_blocks(blocks, fmt, shape)
        return QuantizedTensor(fmt, shape, codes, scales, scale)

    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """Return the weights under the names of their source."""
        stored = inventory.tensors
        tensors: dict[str, TensorInfo] = {}
        formats: dict[str, Format] = {}
        # made by the writer from the configuration, not a weight
        seen = {"rope_freqs.weight"}
        layers = Fields(inventory.config, f"the metadata of {inventory.source}").count("num_hidden_layers", 0)
        # a layer has tensors, so that no file has more layers than tensors
        for name in self.model.weights(min(layers or 0, len(stored))):
            places = [place.name for place in self.model.places(name)]
            if not any(place in stored for place in places):
                continue
            missing = next((place for place in places if place not in stored), None)
            if missing:
                raise CheckpointError(f"{inventory.source} lacks the tensor {missing}")
            parts = [stored[place] for place in places]
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
        strange = next((name for name in stored if name not in seen), None)
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
    """Return the name of the tensor with the global scale of a weight."""
    return f"{name.removesuffix('weight')}scale"
