"""Strict reading of safetensors headers: a little-endian u64 length, then JSON; the weights are not touched.

Format: https://github.com/huggingface/safetensors#format. Stricter than needed to load a file, since a
converter must not guess: duplicate keys, holes and overlaps are errors.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.dtypes import BITS
from halfbyte.checkpoint.files import check_unicode, open_regular, parse_object, read_into, reason
from halfbyte.errors import CheckpointError

#: The safetensors library refuses longer headers too.
MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 32  # NumPy 1.x holds no more dimensions
_MAX_ELEMENTS = 2**60  # offsets in bytes stay below 2**63


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    dtype is the safetensors spelling ("BF16", "F8_E4M3"); file is relative to the inventory's root; offset is
    absolute in that file; offset and nbytes are in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


def read_header(path: Path, file: str) -> tuple[list[TensorInfo], dict[str, str], int]:
    """Read the header of one safetensors file; ``file`` is its name in messages and in the TensorInfos.

    Returns (tensors by offset, metadata, file size in bytes). CheckpointError when anything is off.
    """
    descriptor, size = open_regular(path)
    try:
        length = header_length(_read(descriptor, 8, 0), file, size)
        raw = _read(descriptor, length, 8)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({reason(error)})") from error
    finally:
        os.close(descriptor)
    if len(raw) < length:
        raise CheckpointError(f"{file} is truncated: it became shorter while its header was read")
    tensors, metadata = parse_header(raw, file, size)
    return tensors, metadata, size


def header_length(prefix: bytes, file: str, size: int) -> int:
    """Check the first 8 bytes of a file of ``size`` bytes; returns how many bytes of JSON follow them."""
    if len(prefix) < 8:
        raise CheckpointError(f"{file} is truncated: {size} bytes are too few for a safetensors header")
    if prefix == b"version ":
        raise CheckpointError(f"{file} is a Git LFS pointer, not weights; fetch them with `git lfs pull`")
    length = int.from_bytes(prefix, "little")
    if length > size - 8:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file: its header claims {length} bytes, the file has {size}"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"the header of {file} claims {length} bytes; {MAX_HEADER_BYTES} are the limit")
    return length


def parse_header(raw: bytes, file: str, file_size: int) -> tuple[list[TensorInfo], dict[str, str]]:
    """Check and parse the JSON of a header (without its length prefix) of a file of ``file_size`` bytes."""
    what = f"the header of {file}"
    table = parse_object(raw, what)
    metadata = _metadata(table.pop("__metadata__", None), what)
    check_unicode(table, what)
    start = 8 + len(raw)
    tensors = [_entry(name, value, file, start) for name, value in table.items()]
    # Empty tensors share their offset with the next one and come first; the sort is stable.
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointError(
                f"tensor {tensor.name} in {file} {kind}: it starts at data byte {tensor.offset - start},"
                f" {end - start} is expected"
            )
        end += tensor.nbytes
    if end > file_size:
        raise CheckpointError(
            f"{file} is truncated: its header describes {end} bytes, the file has {file_size}"
            + (f" (the last tensor is {tensors[-1].name})" if tensors else "")
        )
    if end < file_size:
        raise CheckpointError(
            f"{file} is longer than its header says: {end} bytes are described, the file has {file_size}"
        )
    return tensors, metadata


def _read(descriptor: int, count: int, offset: int) -> bytes:
    buffer = bytearray(count)
    return bytes(buffer[: read_into(descriptor, memoryview(buffer), offset)])


def _metadata(value: Any, what: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"__metadata__ in {what} must map text to text")
    check_unicode([*value, *value.values()], f"__metadata__ in {what}")
    return value


def _entry(name: str, value: Any, file: str, start: int) -> TensorInfo:
    """One header entry, checked. Its fields are compared by exact type: ``True`` is no number here."""
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"tensor {name} in {file} must have a dtype, a shape and two data_offsets in the header"
        ) from None
    bits = BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        raise CheckpointError(f"tensor {name} in {file} has the unknown dtype {_short(dtype)}")
    if type(begin) is not int or type(end) is not int or begin < 0 or end < begin:
        raise CheckpointError(f"tensor {name} in {file} has impossible data_offsets")
    elements = check_shape(shape, f"tensor {name} in {file}")
    if elements * bits != (end - begin) * 8:
        raise CheckpointError(
            f"tensor {name} in {file} is {dtype} {shape}, which does not fit the {end - begin} bytes of its"
            " data_offsets"
        )
    return TensorInfo(name, dtype, tuple(shape), file, start + begin, end - begin)


def check_shape(shape: Any, what: str) -> int:
    """The number of elements of a shape from JSON; CheckpointError unless a list of plausible sizes."""
    if type(shape) is not list or len(shape) > _MAX_RANK:
        raise CheckpointError(f"{what} has a shape that is not a list of at most {_MAX_RANK} sizes")
    for size in shape:
        if type(size) is not int or size < 0:
            raise CheckpointError(f"{what} has a shape with {_short(size)}, which is not a non-negative integer")
        if size > _MAX_ELEMENTS:
            raise CheckpointError(f"{what} has a shape that is too large for any file")
    elements = math.prod(shape)
    # An empty tensor must have plausible sizes too: arrays of shape (0, 2**62, 8) cannot exist.
    if elements > _MAX_ELEMENTS or (not elements and math.prod(s or 1 for s in shape) > _MAX_ELEMENTS):
        raise CheckpointError(f"{what} has a shape that is too large for any file")
    return elements


def _short(value: Any) -> str:
    """A wrong value for a message; only its type where it may be large or deeply nested."""
    return repr(value)[:40] if isinstance(value, str | int | float) else f"a {type(value).__name__}"
