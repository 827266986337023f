"""GGUF for llama.cpp: one file that holds weights, configuration and tokenizer.

Tensors, their types and their order are those of llama.cpp's own converter: a stack of experts is one tensor per
projection, q and k rows of Llama are turned to llama.cpp's order of rotary pairs, and norms, biases, routers and sinks
are FP32. NVFP4's tensor scale is the tensor ``<name>.scale`` beside the weight, one number per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from halfbyte.checkpoint import Inventory, Reader, TensorInfo, numpy_dtype
from halfbyte.dialects.base import Array, Container, Dialect, OutputTensor, Written, register_dialect
from halfbyte.dialects.gguf_blocks import BLOCKS, FORMATS, pack_blocks, row_bytes, unpack_blocks
from halfbyte.dialects.gguf_file import GgufContainer, metadata_differences
from halfbyte.dialects.gguf_models import Model, Place, model_of
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.formats import BlockFormat, Format, QuantizedTensor, get_format
from halfbyte.models import Weight

_FLOATS = ("BF16", "F16", "F32")
# what llama.cpp computes in FP32 and nothing else, besides vectors and biases
_FP32 = ("_norm.weight", "ffn_gate_inp.weight")


class GgufDialect(Dialect):
    """GGUF before its model is known; ``for_model`` gives the one that names tensors."""

    name = "gguf"
    about = "llama.cpp: one file with configuration and tokenizer"
    standalone = True

    def for_model(self, inventory: Inventory) -> Dialect:
        """For the checkpoint's architecture."""
        return GgufModel(inventory, model_of(inventory.config), _heads(inventory))

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
        raise NotImplementedError

    def unpack(self, output: OutputTensor, stored: Array, fmt: Format, shape: tuple[int, ...]) -> Array:
        """Codes and scales lie in one tensor; see ``assemble``."""
        raise NotImplementedError

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
class GgufModel(GgufDialect):
    """GGUF for one model. ``heads``: of attention, for queries and for keys."""

    inventory: Inventory
    model: Model
    heads: tuple[int, int]

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """What is no ggml type, and what llama.cpp reads in FP32 or without a tensor scale."""
        unknown = super().problem(weight, fmt)
        if unknown:
            return unknown
        names = [place.name for place in self.model.places(weight.name)]
        if len(weight.shape) < 2 or names[0].endswith(_FP32):
            return f"llama.cpp reads {names[0]} in FP32; keep it"
        if _scaled(fmt) and names[0].split(".")[-2] in self.model.unscaled:
            return (
                f"llama.cpp's {self.model.name} applies no tensor scale to {names[0]}; choose a format without one, "
                "such as mxfp4, q8_0 or nvfp4_unscaled"
            )
        return self.unfit(weight, fmt)

    def unfit(self, weight: Weight, fmt: Format) -> str | None:
        """NVFP4 blocks come in fours."""
        block = BLOCKS.get(fmt.name)
        if block and weight.shape[-1] % block.weights:
            return f"K = {weight.shape[-1]} is not a multiple of the {block.weights} weights of a block in GGUF"
        return None

    def left_out(self, weight: Weight) -> str | None:
        """Buffers."""
        return "a buffer that llama.cpp computes itself" if weight.role == "buffer" else None

    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """Blocks and, where the format has one, the tensor scale."""
        found = []
        *lead, n, k = weight.shape
        for place in self.model.places(weight.name):
            rows = self.model.rows(place, n)
            shape = (*lead, len(range(*rows)) if rows else n, row_bytes(fmt, k))
            found.append(OutputTensor(place.name, "U8", shape, "blocks", rows=rows))
            if _scaled(fmt):
                scale = place.name.removesuffix("weight") + "scale"
                shape = tuple(lead) or (1,)
                found.append(OutputTensor(scale, "F32", shape, "tensor_scale", rows_per_row=0))
        return found

    def stored(self, weight: Weight, fmt: Format, tensors: Any) -> list[OutputTensor]:
        """The converter of llama.cpp leaves tensor scales of 1 out."""
        return [o for o in self.outputs(weight, fmt) if o.part == "blocks" or o.name in tensors]

    def kept(self, weight: Weight, outputs: list[OutputTensor]) -> list[OutputTensor]:
        """In the source's type, or FP32 where llama.cpp wants it; no value changes."""
        if weight.dtype not in _FLOATS:
            raise PlanError(
                f"{weight.name} is {weight.dtype}, and GGUF models hold {', '.join(_FLOATS)}; "
                "give it a rule with a format, or drop it"
            )
        axis = -1 if weight.name.endswith("_bias") else -2
        found = []
        for place in self.model.places(weight.name):
            shape = list(weight.shape)
            rows = self.model.rows(place, shape[axis]) if len(shape) > 1 else None
            if rows:
                shape[axis] = len(range(*rows))
            wide = len(shape) < 2 or place.name.endswith(_FP32) or not place.name.endswith(".weight")
            found.append(OutputTensor(place.name, "F32" if wide else weight.dtype, tuple(shape), "values", rows=rows))
        return found

    def kept_names(self, weight: Weight) -> list[str]:
        """As llama.cpp calls them."""
        return [place.name for place in self.model.places(weight.name)]

    def spell(self, outputs: Sequence[OutputTensor], values: Array, first: int) -> Iterator[Written]:
        """Values in the output's type and rows."""
        for output in outputs:
            part = values
            if output.rows is not None:
                picked = slice(*output.rows)
                part = part[..., picked] if output.name.endswith(".bias") else part[..., picked, :]
            part = np.ascontiguousarray(part.astype(numpy_dtype(output.dtype), copy=False))
            yield from self._placed(output, part, first)

    def write(
        self, outputs: Sequence[OutputTensor], fmt: Format, tensor: QuantizedTensor, expert: int, row: int
    ) -> Iterator[Written]:
        """Blocks of a slice, and its tensor scales."""
        blocks = pack_blocks(tensor)
        for output in outputs:
            if output.part == "tensor_scale":
                assert tensor.tensor_scale is not None
                yield Written(output, expert, np.atleast_1d(tensor.tensor_scale))
            else:
                part = blocks if output.rows is None else blocks[..., slice(*output.rows), :]
                yield from self._placed(output, np.ascontiguousarray(part), expert if len(tensor.shape) > 2 else row)

    def _placed(self, output: OutputTensor, part: Array, first: int) -> Iterator[Written]:
        """Leading indices from ``first`` on where llama.cpp looks for them: in place, or in its order of a head."""
        width = part.size // len(part)
        head = self._head(output.name, output.shape[0])
        if not head:
            yield Written(output, first * width, part)
            return
        places = _rotated(np.arange(first, first + len(part)), head)
        if first % head == 0 and len(part) % head == 0:
            turned = np.empty_like(part)
            turned[places - first] = part
            yield Written(output, first * width, turned)
            return
        for place, values in zip(places.tolist(), part, strict=True):
            yield Written(output, place * width, values)

    def _head(self, name: str, rows: int) -> int:
        """Rows of a head of a tensor whose rows llama.cpp has in another order, else 0."""
        if self.model.rotated:
            for part, count in zip((".attn_q.", ".attn_k."), self.heads, strict=True):
                if part in name:
                    return rows // count
        return 0

    def assemble(
        self,
        weight: Weight,
        fmt: Format,
        outputs: Sequence[OutputTensor],
        read: Callable[[OutputTensor, int, int], Array],
        first: int,
        stop: int,
    ) -> QuantizedTensor:
        """Codes, scales and tensor scales of leading indices (or rows) first..stop."""
        shape = (stop - first, *weight.shape[1:])
        blocks = np.empty((*shape[:-1], row_bytes(fmt, shape[-1])), dtype=np.uint8)
        lead = shape[:-2]
        scale: Array | None = None
        for output in outputs:
            if output.part == "tensor_scale":
                found = read(output, first, stop).reshape(lead)
                if scale is not None and not np.array_equal(found, scale):
                    raise CheckpointError(f"{output.name} differs from the scale of the gate rows; this is not read")
                scale = found
            elif output.rows is None:
                blocks[...] = self._unplaced(output.name, output.shape[0], partial(read, output), first, stop)
            else:
                blocks[..., slice(*output.rows), :] = read(output, first, stop)
        if scale is None and _scaled(fmt):
            scale = np.ones(lead, dtype=np.float32)
        codes, scales = unpack_blocks(blocks, fmt, shape)
        return QuantizedTensor(fmt, shape, codes, scales, scale)

    def _unplaced(self, name: str, rows: int, read: Callable[[int, int], Array], first: int, stop: int) -> Array:
        """The inverse of ``_placed``: whole heads are read and turned back."""
        head = self._head(name, rows)
        if not head:
            return read(first, stop)
        begin, end = first // head * head, -(-stop // head) * head
        return read(begin, end)[_rotated(np.arange(first, stop), head) - begin]

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
        types, found = inventory.ggml_types, inventory.tensors
        layers = int(inventory.config["num_hidden_layers"])
        tensors: dict[str, TensorInfo] = {}
        formats: dict[str, Format] = {}
        # made by the writer from the configuration, not a weight
        seen = {"rope_freqs.weight"}
        for name in self.model.weights(layers):
            places = [place.name for place in self.model.places(name)]
            if not any(place in found for place in places):
                continue
            missing = [place for place in places if place not in found]
            kinds = {types.get(place, "") for place in places if place in found}
            if missing or len(kinds) > 1:
                raise CheckpointError(
                    f"{inventory.source} lacks the tensor {missing[0]}"
                    if missing
                    else f"{places[0]} and {places[1]} of {inventory.source} have different types"
                )
            parts = [found[place] for place in places]
            kind = kinds.pop()
            axis = -1 if name.endswith("_bias") else -2
            shape = list(parts[0].shape)
            if len(parts) > 1:
                shape[axis] = sum(part.shape[axis] for part in parts)
            dtype = parts[0].dtype
            if kind not in _FLOATS:
                if kind not in FORMATS:
                    raise CheckpointError(
                        f"{places[0]} in {inventory.source} is {kind}, which is not read; "
                        f"known are {', '.join(FORMATS)}"
                    )
                block = BLOCKS[FORMATS[kind]]
                scales = [f"{place.removesuffix('weight')}scale" for place in places]
                unscaled = kind == "NVFP4" and not any(scale in found for scale in scales)
                formats[name] = get_format("nvfp4_unscaled" if unscaled else FORMATS[kind])
                shape[-1] = shape[-1] // block.nbytes * block.weights
                dtype = "BF16"
                seen.update(scales)
            seen.update(places)
            size = sum(part.nbytes for part in parts)
            tensors[name] = TensorInfo(name, dtype, tuple(shape), parts[0].file, parts[0].offset, size)
        strange = [name for name in found if name not in seen]
        if strange:
            raise CheckpointError(
                f"{strange[0]} in {inventory.source} belongs to no weight of a {self.model.name} model"
            )
        return tensors, formats

    def differences(self, source: Inventory) -> list[str]:
        """Metadata that is not what the source gives."""
        return metadata_differences(self.inventory, source, self.model)

    def container(
        self, inventory: Inventory, recipe: str, tensors: Sequence[tuple[Weight, Format | None, list[OutputTensor]]]
    ) -> Container:
        """GGUF files with this model's metadata."""
        types = {
            o.name: o.dtype if fmt is None or o.part != "blocks" else BLOCKS[fmt.name].ggml
            for _, fmt, outputs in tensors
            for o in outputs
        }
        return GgufContainer(inventory, self.model, recipe, types, [o for *_, outputs in tensors for o in outputs])

    def notes(self, quantized: Sequence[tuple[Weight, Format]]) -> list[str]:
        """What is not written, and what llama.cpp does otherwise than transformers."""
        names = ["config.json", *self.inventory.side_files]
        return [
            "not written, since a GGUF file holds what llama.cpp reads of them: "
            + ", ".join(names[:6])
            + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        ]


def _scaled(fmt: Format) -> bool:
    return isinstance(fmt, BlockFormat) and fmt.has_tensor_scale


def _rotated(rows: Array, head: int) -> Array:
    """Where rows of q or k lie in llama.cpp's order: the first and the second half of a head alternate."""
    within = rows % head
    return rows - within + within % (head // 2) * 2 + within // (head // 2)


def _heads(inventory: Inventory) -> tuple[int, int]:
    config = inventory.config
    try:
        queries = int(config["num_attention_heads"])
        keys = int(config.get("num_key_value_heads") or queries)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"config.json of {inventory.source} does not say num_attention_heads") from error
    return queries, keys


GGUF = register_dialect(GgufDialect())
