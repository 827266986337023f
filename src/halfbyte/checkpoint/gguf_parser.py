"""Bounded parsing of GGUF headers: metadata and the list of tensors; no weight is read.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Every count and
length is compared with the bytes that are left before anything is made of it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.checkpoint.files import open_regular, read_into, reason
from halfbyte.checkpoint.header import check_shape
from halfbyte.errors import CheckpointError

#: ggml type by number: name, elements of a block, bytes of a block.
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8)},
    **{24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24)},
    **{8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110)},
    **{12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50)},
    **{20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136)},
    **{29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66)},
    **{39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18)},
}
#: The same by name: elements and bytes of a block.
GGML_SIZES = {name: (block, size) for name, block, size in GGML_TYPES.values()}
# value types of metadata: number -> NumPy type
_SCALARS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"},
}
_TEXT, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"

MAX_HEADER_BYTES = 200_000_000
"""Vocabularies of a million tokens with their merges have less."""
_MAX_VALUES = 10_000_000
_MAX_NAME = 65_535
_MAX_DIMENSIONS = 4  # ggml's own limit
_MAX_NESTING = 8
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. ``shape`` counts elements, slowest first; offset (absolute) and nbytes are in bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """One file's metadata (arrays as lists), tensors in the file's order, and size in bytes."""

    metadata: dict[str, Any]
    tensors: list[GgufTensor]
    size: int


class GgufError(CheckpointError):
    """A GGUF file is damaged, or no GGUF file."""


def parse_gguf(path: Path) -> GgufFile:
    """Parse a GGUF file's header; GgufError, with the file's name, where anything in it is off."""
    descriptor, size = open_regular(path)
    try:
        source = _Source(descriptor, size)
        tensor_count, metadata = _metadata(source)
        tensors = _tensors(source, tensor_count, _alignment(metadata))
    except _ProblemError as error:
        raise GgufError(f"{path.name} is no GGUF file or is damaged ({error})") from None
    except CheckpointError as error:
        raise GgufError(f"{path.name} is damaged: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)})") from error
    finally:
        os.close(descriptor)
    return GgufFile(metadata, tensors, size)


class _ProblemError(ValueError):
    pass


class _Source:
    """A file's bytes from the front; a :class:`_ProblemError` for what is not there."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self.size = descriptor, size
        self._buffer, self._begin, self._at = b"", 0, 0
        self._values = 0

    @property
    def position(self) -> int:
        return self._begin + self._at

    @property
    def left(self) -> int:
        return min(self.size, MAX_HEADER_BYTES) - self.position

    def take(self, count: int, what: str) -> bytes:
        end = self._at + count
        if end > len(self._buffer):
            self._fill(count, what)
            end = count
        part = self._buffer[self._at : end]
        self._at = end
        return part

    def integer(self, kind: str, what: str) -> int:
        return int.from_bytes(self.take(struct.calcsize(kind), what), "little")

    def text(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        length = int.from_bytes(self.take(8, what), "little")
        if length > most:
            raise _ProblemError(f"the length of {what} is {length}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise _ProblemError(f"{what} is not UTF-8 text") from None

    def texts(self, number: int, what: str) -> list[str]:
        """Many short texts, without a call for each that lies in the buffer."""
        values: list[str] = []
        for _ in range(number):
            begin = self._at + 8
            end = begin + int.from_bytes(self._buffer[self._at : begin], "little")
            if end > len(self._buffer):
                values.append(self.text(what))
                continue
            try:
                values.append(self._buffer[begin:end].decode())
            except UnicodeDecodeError:
                raise _ProblemError(f"{what} is not UTF-8 text") from None
            self._at = end
        return values

    def count(self, number: int, least: int, what: str) -> int:
        """A number of things of at least ``least`` bytes each, where the file has room for them."""
        self._values += number
        if number * least > self.left or self._values > _MAX_VALUES:
            raise _ProblemError(f"it claims {number} {what}, and has {self.size} bytes")
        return number

    def _fill(self, count: int, what: str) -> None:
        if count > self.left:
            raise _ProblemError(
                f"{what} needs {count} bytes at byte {self.position}, beyond the end of the file or of any header"
            )
        self._begin, self._at = self.position, 0
        part = memoryview(bytearray(min(max(count, _CHUNK), self.left)))
        self._buffer = bytes(part[: read_into(self._descriptor, part, self._begin)])
        if len(self._buffer) < count:
            raise _ProblemError("it became shorter while it was read")


def _metadata(source: _Source) -> tuple[int, dict[str, Any]]:
    """(number of tensors, metadata): all before the list of tensors."""
    magic = source.take(min(4, source.size), "the magic number")
    if magic == b"vers":
        raise _ProblemError("it is a Git LFS pointer; fetch the file with `git lfs pull`")
    if magic != b"GGUF":
        raise _ProblemError("it does not begin with GGUF")
    version = source.integer("<I", "the version")
    if version not in _VERSIONS:
        swapped = " (big-endian)" if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS else ""
        raise _ProblemError(f"its version is {version}{swapped}; 2 and 3, little-endian, are read")
    tensors, pairs = source.integer("<Q", "the number of tensors"), source.integer("<Q", "the number of keys")
    # a name's length, dimensions, type and offset; a key's length, a type and a byte
    source.count(tensors, 8 + 4 + 4 + 8, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(source.count(pairs, 8 + 4 + 1, "keys")):
        key = source.text("a key", _MAX_NAME)
        if key in metadata:
            raise _ProblemError(f"the key {key[:80]!r} appears twice")
        metadata[key] = _value(source, source.integer("<I", f"the type of {key[:80]!r}"), f"the value of {key[:80]!r}")
    return tensors, metadata


def _value(source: _Source, kind: int, what: str, depth: int = 0) -> Any:
    if kind in _SCALARS:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(source.take(dtype.itemsize, what), dtype=dtype)[0].item()
    if kind == _TEXT:
        return source.text(what)
    if kind != _ARRAY or depth > _MAX_NESTING:
        raise _ProblemError(f"{what} is of an unknown type ({kind})" if kind != _ARRAY else f"{what} is nested deeply")
    inner, number = source.integer("<I", what), source.integer("<Q", what)
    if inner in _SCALARS:
        dtype = np.dtype(_SCALARS[inner])
        source.count(number, dtype.itemsize, f"values in {what}")
        values: list[Any] = np.frombuffer(source.take(number * dtype.itemsize, what), dtype=dtype).tolist()
        return values
    source.count(number, 8 if inner == _TEXT else 12, f"values in {what}")
    if inner == _TEXT:
        return source.texts(number, what)
    return [_value(source, inner, what, depth + 1) for _ in range(number)]


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get(_ALIGNMENT, 32)
    if type(alignment) is not int or not 0 < alignment < 1 << 31 or alignment & (alignment - 1):
        raise _ProblemError(f"{_ALIGNMENT} is not a power of two")
    return alignment


def _tensors(source: _Source, number: int, alignment: int) -> list[GgufTensor]:
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(number):
        name = source.text("the name of a tensor", _MAX_NAME)
        what = f"tensor {name[:80]!r}"
        if name in entries:
            raise _ProblemError(f"{what} appears twice")
        dimensions = source.integer("<I", what)
        if dimensions > _MAX_DIMENSIONS:
            raise _ProblemError(f"{what} has {dimensions} dimensions")
        shape = [source.integer("<Q", what) for _ in range(dimensions)][::-1]
        number_of_type = source.integer("<I", what)
        if number_of_type not in GGML_TYPES:
            raise _ProblemError(f"{what} is of an unknown type ({number_of_type})")
        kind, block, size = GGML_TYPES[number_of_type]
        elements = check_shape(shape, what)
        if block > 1 and (not shape or shape[-1] % block):
            raise _ProblemError(f"{what} has rows that are no whole {kind} blocks of {block}")
        entries[name] = kind, tuple(shape), source.integer("<Q", what), elements // block * size
    begin = source.position + -source.position % alignment
    tensors = [GgufTensor(name, kind, shape, begin + at, size) for name, (kind, shape, at, size) in entries.items()]
    _check_places(tensors, source.size, begin, alignment)
    return tensors


def _check_places(tensors: list[GgufTensor], size: int, begin: int, alignment: int) -> None:
    """Refuse tensors beyond the end, off the alignment, or over one another."""
    end = begin
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if (tensor.offset - begin) % alignment:
            raise _ProblemError(f"tensor {tensor.name[:80]!r} does not begin at a multiple of {alignment} bytes")
        if tensor.offset < end:
            raise _ProblemError(f"tensor {tensor.name[:80]!r} overlaps the one before it")
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise _ProblemError(f"it is truncated: {tensor.name[:80]!r} would end at byte {end} of {size}")
