"""llama.cpp's importance matrices: ``imatrix.gguf`` and the older ``imatrix.dat``.

Layouts: https://github.com/ggml-org/llama.cpp, tools/imatrix/imatrix.cpp.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.calibration.importance import MAX_IMPORTANCE_BYTES, Importance, add_entry
from halfbyte.checkpoint import copy_file_atomic, write_file_atomic
from halfbyte.checkpoint.files import read_small
from halfbyte.checkpoint.foreign import Fields
from halfbyte.checkpoint.gguf_parser import GgufFile, parse_gguf
from halfbyte.checkpoint.scratch import scratch_folder
from halfbyte.errors import CheckpointError, HalfbyteError

_LONGEST_NAME = 4096
_SUMS, _COUNTS, _PLAIN_SUMS = ".in_sum2", ".counts", ".in_sum"


class _Bytes:
    """A file's content, taken from the front; what is not there is a CheckpointError."""

    def __init__(self, data: bytes, file: str) -> None:
        self.data, self.file, self.position = data, file, 0

    def take(self, size: int, what: str) -> bytes:
        if size < 0 or size > len(self.data) - self.position:
            raise CheckpointError(
                f"{self.file} is no imatrix or truncated: {what} needs {size} bytes at byte {self.position}, "
                f"the file has {len(self.data)}"
            )
        self.position += size
        return self.data[self.position - size : self.position]

    def integer(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])

    def text(self, what: str, length: int) -> str:
        if not 0 <= length <= _LONGEST_NAME:
            raise CheckpointError(f"{self.file} is no imatrix: the length of {what} is {length}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.file} is no imatrix: {what} is not valid text") from None


def read_dat(path: Path) -> Importance:
    """Read the legacy layout: per entry a name, a number of calls and sums of squared activations.

    i32 entries; per entry i32 name length, name, i32 calls, i32 values, f32 values; then, in newer files, i32
    last chunk, i32 length, data-set name. Stacked experts are one flat array.
    """
    source = _Bytes(_read(path), path.name)
    entries = source.integer("the number of entries")
    if entries < 1:
        raise CheckpointError(f"{path.name} is no imatrix: it claims {entries} entries")
    result = Importance({}, {}, "gguf")
    for index in range(entries):
        where = f"entry {index + 1} of {entries}"
        length = source.integer(where)
        name = source.text(f"the name of {where}", length)
        calls, count = source.integer(where), source.integer(where)
        if not name or calls < 0 or count < 1:
            raise CheckpointError(f"{path.name} is no imatrix: {where} ({name!r}) has {calls} calls, {count} values")
        sums = np.frombuffer(source.take(4 * count, f"{where} ({name})"), dtype="<f4")
        with np.errstate(over="ignore", invalid="ignore"):  # add_entry refuses infinities and NaNs
            means = sums / np.float32(max(calls, 1)) if calls else np.zeros_like(sums)
        add_entry(result, name, means, np.asarray(calls), path.name)
    if source.position < len(source.data):
        result.chunks = max(source.integer("the last chunk"), 0)
        dataset = source.text("the data set's name", source.integer("the data set's name"))
        result.datasets = (dataset,) if dataset else ()
    if source.position < len(source.data):
        rest = len(source.data) - source.position
        raise CheckpointError(f"{path.name} is no imatrix: {rest} bytes follow its end")
    return result


def write_dat(importance: Importance, path: str | Path) -> None:
    """Write the legacy layout. Experts without data get ones, as llama.cpp writes them."""
    parts = [struct.pack("<i", len(importance.values))]
    for name, values in importance.values.items():
        counts = importance.counts[name]
        calls = min(max(int(counts.max(initial=0)), 1), 2**31 - 1)
        means = np.where(counts[..., None] > 0, values, np.float32(1)) if counts.ndim else values
        spelled = name.encode()
        parts.append(struct.pack("<i", len(spelled)) + spelled + struct.pack("<ii", calls, means.size))
        parts.append((means * np.float32(calls)).astype("<f4").tobytes())
    dataset = ", ".join(importance.datasets).encode()
    parts.append(struct.pack("<ii", importance.chunks, len(dataset)) + dataset)
    write_file_atomic(path, b"".join(parts))


def read_gguf(path: Path) -> Importance:
    """Read ``imatrix.gguf``: ``NAME.in_sum2`` [n_mat, n_in] over ``NAME.counts`` [n_mat]."""
    parsed = parse_gguf(path)
    fields = Fields(parsed.metadata, path.name)
    kind, names = parsed.metadata.get("general.type"), fields.texts("imatrix.datasets")
    chunks = fields.count("imatrix.chunk_count", 0) or 0
    if kind != "imatrix":
        raise CheckpointError(f"{path.name} is a GGUF file but no importance matrix (general.type is {kind!r})")
    result = Importance({}, {}, "gguf", tuple(names), chunks)
    arrays = _arrays(path, parsed)
    for name, array in arrays.items():
        if name.endswith(_SUMS):
            entry = name.removesuffix(_SUMS)
            _add_sums(result, entry, array, arrays.get(entry + _COUNTS), path.name)
        elif not name.endswith((_COUNTS, _PLAIN_SUMS)) or name.rsplit(".", 1)[0] + _SUMS not in arrays:
            raise CheckpointError(f"{path.name} holds {name}, which belongs to no importance entry")
    if not result.values:
        raise CheckpointError(f"{path.name} holds no importance entries")
    return result


def _arrays(path: Path, parsed: GgufFile) -> dict[str, NDArray[np.float32]]:
    """The tensors of a file, which must all be FP32."""
    arrays = {}
    data = _read(path)
    for tensor in parsed.tensors:
        if tensor.kind != "F32":
            raise CheckpointError(f"{tensor.name} in {path.name} is {tensor.kind}, but importance is FP32")
        raw = data[tensor.offset : tensor.offset + tensor.nbytes]
        if len(raw) < tensor.nbytes:
            raise CheckpointError(f"{path.name} became shorter while it was read")
        arrays[tensor.name] = np.frombuffer(raw, dtype="<f4").reshape(tensor.shape)
    return arrays


def _add_sums(into: Importance, name: str, sums: NDArray[Any], counts: NDArray[Any] | None, file: str) -> None:
    if counts is None:
        raise CheckpointError(f"{file} lacks {name}{_COUNTS}; the file is incomplete")
    rows = sums.reshape(-1, sums.shape[-1]) if sums.ndim and sums.size else sums.reshape(0, 1)
    tokens = counts.reshape(-1)
    if not len(rows) or len(tokens) != len(rows):
        raise CheckpointError(f"{name} in {file} has {len(rows)} matrices, but counts for {len(tokens)}")
    if not (np.isfinite(tokens).all() and (tokens >= 0).all() and (tokens < 2**62).all()):
        raise CheckpointError(f"the counts of {name} in {file} are negative or not finite; the file is damaged")
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaNs are refused by add_entry
        means = np.where(tokens[:, None] > 0, rows / np.maximum(tokens, 1)[:, None], np.float32(0))
    whole = tokens.astype(np.int64)
    single = len(rows) == 1
    add_entry(into, name, means[0] if single else means, whole[0] if single else whole, file)


def write_gguf(importance: Importance, path: str | Path) -> None:
    """Write ``imatrix.gguf``; needs the extra ``gguf``. Flat stacks of legacy files must be matched first."""
    gguf = _library()
    writer = gguf.GGUFWriter(None, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(importance.datasets) or [""])
    writer.add_uint32("imatrix.chunk_count", importance.chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in importance.values.items():
        rows = np.atleast_2d(values)
        counts = np.broadcast_to(importance.counts[name].reshape(-1, 1), (len(rows), 1)).astype(np.float32)
        writer.add_tensor(name + _SUMS, np.ascontiguousarray(rows * counts))
        writer.add_tensor(name + _COUNTS, np.ascontiguousarray(counts))
    with scratch_folder("halfbyte") as folder:
        whole = folder / "imatrix.gguf"
        writer.write_header_to_file(whole)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        copy_file_atomic(whole, path)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise HalfbyteError(
            "writing imatrix.gguf needs the gguf library; install it: pip install 'halfbyte[gguf]'"
        ) from error
    return gguf


def _read(path: Path) -> bytes:
    return read_small(path, MAX_IMPORTANCE_BYTES)
