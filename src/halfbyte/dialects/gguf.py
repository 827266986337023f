"""GGUF for llama.cpp: one file that holds weights, configuration and tokenizer.

Tensors, their types and their order are those of llama.cpp's own converter: a stack of experts is one tensor per
projection, q and k rows of Llama are turned to llama.cpp's order of rotary pairs, and norms, biases, routers and sinks
are FP32. NVFP4's global scale is the tensor ``<name>.scale`` beside the weight, one number per expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from halfbyte.checkpoint import Inventory, numpy_dtype
from halfbyte.dialects.dialect import Dialect, register_dialect
from halfbyte.dialects.gguf_blocks import BLOCKS, pack_blocks, row_bytes
from halfbyte.dialects.gguf_file import GgufContainer, metadata_differences
from halfbyte.dialects.gguf_metadata import remarks
from halfbyte.dialects.gguf_models import model_of
from halfbyte.dialects.gguf_source import FLOATS, GgufBase, GgufReading, rotated, scale_name, scaled
from halfbyte.dialects.gguf_vocab import tokenizer_remarks
from halfbyte.dialects.outputs import Array, Container, OutputChunk, OutputTensor
from halfbyte.errors import PlanError
from halfbyte.formats import Format, QuantizedTensor
from halfbyte.models import Weight

# what llama.cpp computes in FP32 and nothing else, besides vectors and biases
_FP32 = ("_norm.weight", "ffn_gate_inp.weight")


class GgufModel(GgufReading):
    """GGUF for one model."""

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """What is no ggml type, and what llama.cpp reads in FP32 or without a global scale."""
        unknown = super().problem(weight, fmt)
        if unknown:
            return unknown
        names = [place.name for place in self.model.places(weight.name)]
        if len(weight.shape) < 2 or names[0].endswith(_FP32):
            return f"llama.cpp reads {names[0]} in FP32; keep it"
        if scaled(fmt) and names[0].split(".")[-2] in self.model.unscaled:
            return (
                f"llama.cpp's {self.model.name} applies no global scale to {names[0]}; choose a format without one, "
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
        """Blocks and, where the format has one, the global scale."""
        found = []
        *lead, n, k = weight.shape
        for place in self.model.places(weight.name):
            rows = self.model.rows(place, n)
            shape = (*lead, len(range(*rows)) if rows else n, row_bytes(fmt, k))
            found.append(OutputTensor(place.name, "U8", shape, "blocks", rows=rows))
            if scaled(fmt):
                shape = tuple(lead) or (1,)
                found.append(OutputTensor(scale_name(place.name), "F32", shape, "global_scale", rows_per_row=0))
        return found

    def kept(self, weight: Weight, outputs: list[OutputTensor]) -> list[OutputTensor]:
        """In the source's type, or FP32 where llama.cpp wants it; no value changes."""
        if weight.dtype not in FLOATS:
            raise PlanError(
                f"{weight.name} is {weight.dtype}, and GGUF models hold {', '.join(FLOATS)}; "
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

    def spell(self, outputs: Sequence[OutputTensor], values: Array, first: int) -> Iterator[OutputChunk]:
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
    ) -> Iterator[OutputChunk]:
        """Blocks of a slice, and its global scales."""
        blocks = pack_blocks(tensor)
        for output in outputs:
            if output.part == "global_scale":
                assert tensor.global_scale is not None
                yield OutputChunk(output, expert, np.atleast_1d(tensor.global_scale))
            else:
                part = blocks if output.rows is None else blocks[..., slice(*output.rows), :]
                yield from self._placed(output, np.ascontiguousarray(part), expert if len(tensor.shape) > 2 else row)

    def _placed(self, output: OutputTensor, part: Array, first: int) -> Iterator[OutputChunk]:
        """Leading indices from ``first`` on where llama.cpp looks for them: in place, or in its order of a head."""
        width = part.size // len(part)
        head = self.head(output.name, output.shape[0])
        if not head:
            yield OutputChunk(output, first * width, part)
            return
        places = rotated(np.arange(first, first + len(part)), head)
        if first % head == 0 and len(part) % head == 0:
            turned = np.empty_like(part)
            turned[places - first] = part
            yield OutputChunk(output, first * width, turned)
            return
        for place, values in zip(places.tolist(), part, strict=True):
            yield OutputChunk(output, place * width, values)

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
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        left = "not written, since the GGUF file holds what llama.cpp reads of them: "
        return [left + ", ".join(names[:6]) + more, *remarks(self.inventory), *tokenizer_remarks(self.inventory)]


class GgufDialect(GgufBase):
    """GGUF before its model is known; ``for_model`` gives the one that names tensors."""

    def for_model(self, inventory: Inventory) -> Dialect:
        """For the checkpoint's architecture."""
        return GgufModel(inventory, model_of(inventory.config), _heads(inventory))


def _heads(inventory: Inventory) -> tuple[int, int]:
    config = inventory.config
    try:
        queries = int(config["num_attention_heads"])
        keys = int(config.get("num_key_value_heads") or queries)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"config.json of {inventory.source} does not say num_attention_heads") from error
    return queries, keys


GGUF = register_dialect(GgufDialect())
