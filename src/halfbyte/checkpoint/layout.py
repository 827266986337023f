"""A safetensors header before any weight is known: names, dtypes and shapes give every offset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring

from halfbyte.checkpoint.dtypes import nbytes
from halfbyte.checkpoint.files import collector_paused
from halfbyte.checkpoint.header import MAX_HEADER_BYTES
from halfbyte.errors import CheckpointError, OutputError


@dataclass(frozen=True, slots=True)
class Layout:
    """A planned file. All positions are absolute bytes in it.

    header: the file's first bytes (length prefix, JSON, padding); offsets: where each entry starts, in the
    order given; total: the size of the file; gaps: ranges of zeros between the entries, which nothing fills.
    """

    header: bytes
    offsets: list[int]
    total: int
    gaps: tuple[tuple[int, int], ...] = ()


@collector_paused()
def build_header(
    entries: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> Layout:
    """Lay out (name, dtype, shape) entries one after the other, in this order; same input, same bytes.

    ``metadata`` defaults to {"format": "pt"}, without which transformers refuses a file. Readers load any
    order; entries by falling element size keep each tensor aligned. OutputError on a duplicate or an
    impossible entry.
    """
    table = [f'{{"__metadata__":{_json({"format": "pt"} if metadata is None else dict(metadata))}']
    seen = {"__metadata__"}
    # a checkpoint of 200,000 tensors has a dozen kinds of them: their size and spelling are found once
    kinds: dict[tuple[str, tuple[int, ...]], tuple[int, str]] = {}
    starts: list[int] = []
    end = 0
    for name, dtype, shape in entries:
        if name in seen:
            raise OutputError(f"the output would hold the name {name} twice in one file")
        seen.add(name)
        key = (dtype, tuple(shape))
        kind = kinds.get(key)
        if kind is None:
            kind = kinds[key] = _kind(name, dtype, [int(size) for size in shape])
        size, spelled = kind
        starts.append(end)
        table.append(f'{encode_basestring(name)}:{spelled}"data_offsets":[{end},{end + size}]}}')
        end += size
    try:
        text = (",".join(table) + "}").encode()
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


def _kind(name: str, dtype: str, shape: list[int]) -> tuple[int, str]:
    """Bytes of a tensor, and the beginning of its entry."""
    if any(size < 0 for size in shape):
        raise OutputError(f"output tensor {name} has the impossible shape {shape}")
    try:
        size = nbytes(dtype, shape)
    except CheckpointError as error:
        raise OutputError(f"output tensor {name} cannot be written: {error}") from error
    return size, f'{{"dtype":{_json(dtype)},"shape":{_json(shape)},'


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
