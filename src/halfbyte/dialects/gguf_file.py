"""The files of a GGUF output before any weight is known: metadata, tensor list, offsets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.checkpoint import Inventory, Layout, Reader, nbytes
from halfbyte.checkpoint.scratch import scratch_folder
from halfbyte.dialects.gguf_metadata import describe, general, rope_factors
from halfbyte.dialects.gguf_models import Model, library
from halfbyte.dialects.gguf_source import library_reads, read_tokenizer
from halfbyte.dialects.gguf_vocab import add_tokenizer
from halfbyte.dialects.outputs import Container, OutputTensor
from halfbyte.errors import PlanError

_ROPE = "rope_freqs.weight"
_SPLIT = ("split.no", "split.count", "split.tensors.count")
# the type that names a file in llama.cpp: that of most bytes
_FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "MXFP4": "MOSTLY_MXFP4_MOE",
    "NVFP4": "MOSTLY_NVFP4",
    "Q4_0": "MOSTLY_Q4_0",
    "IQ4_NL": "MOSTLY_IQ4_NL",
    "Q8_0": "MOSTLY_Q8_0",
}


class GgufContainer(Container):
    """GGUF files: the first one holds all metadata, as llama.cpp's own splits do.

    ``types``: the ggml type of every tensor.
    """

    def __init__(
        self, inventory: Inventory, model: Model, recipe: str, types: dict[str, str], outputs: Sequence[OutputTensor]
    ) -> None:
        self._gguf = library()
        self._types = types
        # the words of strangers' recipes and folders become part of a file's name
        self._stem = re.sub(r"[^\w.+ -]", "-", f"{model_name(inventory)}-{recipe}")
        self._rope = rope_factors(inventory.config, model, inventory.source)
        self.writer = metadata(inventory, model, main_type(types, outputs), self._infos(outputs))
        with library_reads(inventory):
            self.overhead = len(self._header(self.writer, []))

    def name(self, number: int, count: int) -> str:
        """Name files as llama.cpp names its splits."""
        if count == 1:
            return f"{self._stem}.gguf"
        return str(self._gguf.gguf_writer.SHARD_NAME_FORMAT.format(self._stem, number + 1, count))

    def layout(self, number: int, count: int, outputs: Sequence[OutputTensor], total: int) -> Layout:
        """Metadata and tensor list, then the tensors, each at a multiple of 32 bytes from their beginning."""
        writer = self.writer
        if number:
            writer = self._gguf.GGUFWriter(None, writer.arch)
            writer.kv_data[0].clear()
        rope = self._rope if number == 0 else None
        if count > 1:
            writer.add_uint16(_SPLIT[0], number)
            writer.add_uint16(_SPLIT[1], count)
            writer.add_int32(_SPLIT[2], total + (self._rope is not None))
        infos = [(_ROPE, rope.shape, "F32", rope.nbytes)] if rope is not None else []
        header = self._header(writer, [*infos, *self._infos(outputs)])
        align = writer.data_alignment
        if rope is not None:
            # made from the configuration, so it is known now and written with the header
            header += _padded(rope.tobytes(), align)
        offsets, gaps, end = [], [], len(header)
        for output in outputs:
            offsets.append(end)
            size = nbytes(output.dtype, output.shape)
            padded = end + size + -size % align
            if padded > end + size:
                gaps.append((end + size, padded))
            end = padded
        return Layout(header, offsets, end, tuple(gaps))

    def _infos(self, outputs: Sequence[OutputTensor]) -> list[tuple[str, tuple[int, ...], str, int]]:
        return [(o.name, o.shape, self._types[o.name], nbytes(o.dtype, o.shape)) for o in outputs]

    def _header(self, writer: Any, infos: Sequence[tuple[str, tuple[int, ...], str, int]]) -> bytes:
        """A file's bytes before its first tensor, written by the library."""
        fresh = self._gguf.GGUFWriter(None, writer.arch)
        fresh.kv_data = [dict(writer.kv_data[0])]
        add_infos(fresh, infos)
        with scratch_folder("halfbyte") as folder:
            path = folder / "header"
            fresh.write_header_to_file(path)
            fresh.write_kv_data_to_file()
            fresh.write_ti_data_to_file()
            fresh.close()
            return _padded(path.read_bytes(), writer.data_alignment)


def metadata(
    inventory: Inventory, model: Model, main: str, infos: Sequence[tuple[str, tuple[int, ...], str, int]]
) -> Any:
    """A writer of the library with all metadata of a model, and no tensors. PlanError if something is lacking."""
    gguf = library()
    if inventory.root is None and inventory.remote is None:
        raise PlanError(
            f"{inventory.source} is an inventory without files, and a GGUF file holds the tokenizer; "
            "give the checkpoint itself"
        )
    counted = gguf.GGUFWriter(None, model.name)
    add_infos(counted, infos)
    writer = gguf.GGUFWriter(None, model.name)
    tokenizer = read_tokenizer(inventory)
    with library_reads(inventory):
        general(writer, inventory.store.folder(), model_name(inventory), counted.get_total_parameter_count())
        describe(writer, inventory, model)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[main]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, inventory, tokenizer)
    return writer


def metadata_differences(output: Inventory, source: Inventory, model: Model) -> list[str]:
    """Keys of an output that are not what the source gives; names, descriptions and splits do not matter."""
    stated = output.meta["gguf"]
    wanted = metadata(source, model, "F32", []).kv_data[0]
    problems = []
    for key, value in wanted.items():
        if key.startswith("general.") and key != "general.architecture":
            continue
        if key not in stated:
            problems.append(f"the metadata lacks {key}")
        elif not _alike(stated[key], value.value):
            problems.append(f"{key} of the metadata is not what the source gives")
    rope = rope_factors(source.config, model, source.source)
    info = output.tensors.get(_ROPE)
    if (rope is None) != (info is None):
        problems.append(f"{_ROPE} is {'missing' if info is None else 'there'}, which does not fit the source")
    elif rope is not None:
        with Reader(output) as reader:
            if not np.array_equal(reader.read(_ROPE), rope):
                problems.append(f"{_ROPE} is not what the source gives")
    return problems


def _alike(stated: Any, wanted: Any) -> bool:
    if isinstance(wanted, list) and wanted and isinstance(wanted[0], float):
        pairs = zip(stated, wanted, strict=False) if isinstance(stated, list) else ()
        return isinstance(stated, list) and len(stated) == len(wanted) and all(_alike(a, b) for a, b in pairs)
    if isinstance(wanted, float):
        if isinstance(stated, bool) or not isinstance(stated, int | float):
            return False
        with np.errstate(over="ignore"):
            return bool(np.float32(stated) == np.float32(wanted))
    return bool(stated == wanted)


def main_type(types: dict[str, str], outputs: Sequence[OutputTensor]) -> str:
    """The type of most bytes."""
    sizes: dict[str, int] = {}
    for o in outputs:
        sizes[types[o.name]] = sizes.get(types[o.name], 0) + nbytes(o.dtype, o.shape)
    quantized = [kind for kind in sizes if kind not in ("F32", "F16", "BF16")]
    return max(quantized or sizes, key=lambda kind: sizes[kind])


def add_infos(writer: Any, infos: Sequence[tuple[str, tuple[int, ...], str, int]]) -> None:
    """Tensors (name, stored shape, ggml type, bytes) in this order."""
    gguf = library()
    for name, shape, kind, size in infos:
        plain = kind in ("F32", "F16", "BF16")
        stored = np.dtype(np.float32) if plain else np.dtype(np.uint8)
        writer.add_tensor_info(name, shape, stored, size, gguf.GGMLQuantizationType[kind])


def model_name(inventory: Inventory) -> str:
    """What the user calls the model: the last word of its path or hub id."""
    return Path(inventory.source).resolve().name if inventory.revision is None else inventory.source.split("/")[-1]


def _padded(content: bytes, align: int) -> bytes:
    return content + bytes(-len(content) % align)
