"""A safetensors header before any weight is known: names, dtypes and shapes give every offset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halfbyte.checkpoint.dtypes import nbytes
from halfbyte.checkpoint.files import collector_paused
from halfbyte.checkpoint.header import MAX_HEADER_BYTES
from halfbyte.errors import CheckpointError, OutputError


@dataclass(frozen=True, slots=True)
class Layout:
    """A planned file. All positions are absolute bytes in it.

    header: the file's first bytes (length prefix, JSON, padding); offsets: where each entry starts, in the
    order given; total: the size of the file.
    """

    header: bytes
    offsets: list[int]
    total: int


@collector_paused()
def build_header(
    entries: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> Layout:
    """Lay out (name, dtype, shape) entries one after the other, in this order; same input, same bytes.

    ``metadata`` defaults to {"format": "pt"}, without which transformers refuses a file. Readers load any
    order; entries by falling element size keep each tensor aligned. OutputError on a duplicate or an
    impossible entry.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    starts: list[int] = []
    end = 0
    for name, dtype, shape in entries:
        if name in table:
            raise OutputError(f"the output would hold the name {name} twice in one file")
        sizes = [int(size) for size in shape]
        if any(size < 0 for size in sizes):
            raise OutputError(f"output tensor {name} has the impossible shape {sizes}")
        try:
            size = nbytes(dtype, sizes)
        except CheckpointError as error:
            raise OutputError(f"output tensor {name} cannot be written: {error}") from error
        starts.append(end)
        table[name] = {"dtype": dtype, "shape": sizes, "data_offsets": [end, end + size]}
        end += size
    try:
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise OutputError("the output holds a tensor name or metadata that is not valid Unicode") from error
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise OutputError(
            f"{len(starts)} tensors need a header of {len(text)} bytes, the limit is {MAX_HEADER_BYTES};"
            " write smaller shards"
        )
    header = len(text).to_bytes(8, "little") + text
    return Layout(header, [len(header) + start for start in starts], len(header) + end)
