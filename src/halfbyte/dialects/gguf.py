"""GGUF for llama.cpp: one file that holds weights, configuration and tokenizer.

Tensors, their types and their order are those of llama.cpp's own converter: a stack of experts is one tensor per
projection, q and k rows of Llama are brought to llama.cpp's order of rotary pairs, and norms, biases, routers and sinks
are FP32. NVFP4's global scale is the tensor ``<name>.scale`` beside the weight, one number per expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.checkpoint import Inventory
from halfbyte.checkpoint.foreign import Fields
from halfbyte.dialects.capabilities import Package
from halfbyte.dialects.dialect import Dialect, register_dialect
from halfbyte.dialects.gguf_blocks import BLOCKS
from halfbyte.dialects.gguf_file import GgufContainer, metadata_differences
from halfbyte.dialects.gguf_layout import GgufLayout
from halfbyte.dialects.gguf_metadata import remarks
from halfbyte.dialects.gguf_models import Model, model_of
from halfbyte.dialects.gguf_rows import RowOrder
from halfbyte.dialects.gguf_spelling import GgufModelSpelling, GgufSpelling
from halfbyte.dialects.gguf_vocab import tokenizer_remarks
from halfbyte.dialects.outputs import Container, OutputTensor
from halfbyte.dialects.spelling import Spelling
from halfbyte.errors import PlanError
from halfbyte.formats import Format
from halfbyte.models import Weight


class GgufPackage(Package):
    """Files that hold configuration and tokenizer."""

    standalone = True


class GgufModelPackage(GgufPackage):
    """GGUF files with the metadata of a model; ``inventory`` is the source, or the output that is checked."""

    def __init__(self, inventory: Inventory, model: Model) -> None:
        self.inventory = inventory
        self.model = model

    def container(
        self, inventory: Inventory, recipe: str, tensors: Sequence[tuple[Weight, Format | None, list[OutputTensor]]]
    ) -> Container:
        """Return GGUF files with this model's metadata."""
        types = {
            o.name: o.dtype if fmt is None or o.part != "blocks" else BLOCKS[fmt.name].ggml
            for _, fmt, outputs in tensors
            for o in outputs
        }
        return GgufContainer(inventory, self.model, recipe, types, [o for *_, outputs in tensors for o in outputs])

    def differences(self, source: Inventory) -> list[str]:
        """List metadata that is not what the source gives."""
        return metadata_differences(self.inventory, source, self.model)


class GgufDialect(Dialect):
    """GGUF before its model is known; ``for_model`` gives the one that names tensors."""

    name = "gguf"
    about = "llama.cpp: one file with configuration and tokenizer"
    spelling: Spelling = GgufSpelling()
    package: Package = GgufPackage()

    def claims(self, inventory: Inventory) -> bool:
        """Recognise the types that only GGUF files have."""
        return bool(inventory.ggml_types)

    def config(
        self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight], activations: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return nothing: the types stand in the file."""
        return {}

    def for_model(self, inventory: Inventory) -> Dialect:
        """Bind to the checkpoint's architecture."""
        return GgufModelDialect(inventory, model_of(inventory.config))


class GgufModelDialect(GgufDialect):
    """GGUF with the names, types and metadata of one model."""

    def __init__(self, inventory: Inventory, model: Model) -> None:
        self.inventory = inventory
        order = RowOrder(model, _heads(inventory))
        self.spelling = GgufModelSpelling(model, order)
        self.unquantized = GgufLayout(model, order)
        self.package = GgufModelPackage(inventory, model)

    def notes(self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight]) -> list[str]:
        """List what is not written, and what llama.cpp does otherwise than transformers."""
        names = ["config.json", *self.inventory.side_files]
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        left = "not written, since the GGUF file holds what llama.cpp reads of them: "
        return [left + ", ".join(names[:6]) + more, *remarks(self.inventory), *tokenizer_remarks(self.inventory)]


def _heads(inventory: Inventory) -> tuple[int, int]:
    fields = Fields(inventory.config, f"config.json of {inventory.source}")
    queries = fields.count("num_attention_heads", least=1)
    if queries is None:
        raise PlanError(f"config.json of {inventory.source} does not say num_attention_heads")
    return queries, fields.count("num_key_value_heads") or queries


GGUF = register_dialect(GgufDialect())
