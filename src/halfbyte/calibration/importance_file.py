"""Files of importance: halfbyte's own, llama.cpp's, and folders of statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.calibration.imatrix import read_dat, read_gguf
from halfbyte.calibration.importance import MAX_IMPORTANCE_BYTES, Importance, add_entry
from halfbyte.calibration.statistics import Statistics
from halfbyte.checkpoint import ShardWriter, build_header
from halfbyte.checkpoint.files import read_small, read_start
from halfbyte.checkpoint.header import read_header
from halfbyte.errors import CheckpointError

_KIND = "halfbyte-importance"
_COUNTS = ".counts"


def read_importance(path: str | Path) -> Importance:
    """Read an importance file: halfbyte's ``.safetensors``, ``imatrix.gguf`` or a legacy ``imatrix.dat``.

    The content decides, not the ending; a folder is one of statistics (``halfbyte.calibration.statistics``).
    CheckpointError for a file that is damaged or something else.
    """
    path = Path(path)
    if path.is_dir():
        return Statistics(path).importance()
    start = read_start(path, 9)
    if start[:4] == b"GGUF":
        return read_gguf(path)
    if start[8:] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors(path)
    return read_dat(path)


def write_importance(importance: Importance, path: str | Path) -> None:
    """Write halfbyte's importance file: per name FP32 means, and int64 ``<name>.counts``."""
    if importance.spelling != "checkpoint":
        raise CheckpointError("importance under llama.cpp's names cannot be written; match it to a checkpoint first")
    arrays: dict[str, NDArray[Any]] = {}
    for name, counts in importance.counts.items():
        arrays[name + _COUNTS] = np.asarray(counts, dtype=np.int64)
    for name, values in importance.values.items():
        arrays[name] = np.asarray(values, dtype=np.float32)
    entries = [(name, "I64" if a.dtype == np.int64 else "F32", a.shape) for name, a in arrays.items()]
    notes = {"format": _KIND, "version": "1", "datasets": "\n".join(importance.datasets)}
    layout = build_header(entries, notes | {"chunks": str(importance.chunks)})
    with ShardWriter(path, layout) as writer:
        for array, offset in zip(arrays.values(), layout.offsets, strict=True):
            writer.write_at(offset, np.ascontiguousarray(array))
        writer.commit()


def _read_safetensors(path: Path) -> Importance:
    tensors, metadata, _ = read_header(path, path.name)
    if metadata.get("format") != _KIND:
        raise CheckpointError(f"{path.name} is a safetensors file but holds no importance that halfbyte wrote")
    if metadata.get("version") != "1":
        raise CheckpointError(f"{path.name} is of a newer version than this halfbyte reads; update halfbyte")
    data = read_small(path, MAX_IMPORTANCE_BYTES)
    arrays: dict[str, NDArray[Any]] = {}
    for tensor in tensors:
        wanted = "I64" if tensor.name.endswith(_COUNTS) else "F32"
        if tensor.dtype != wanted or 0 in tensor.shape:
            raise CheckpointError(f"{tensor.name} in {path.name} is {tensor.dtype} {list(tensor.shape)}, not {wanted}")
        raw = data[tensor.offset : tensor.offset + tensor.nbytes]
        kind = "<i8" if wanted == "I64" else "<f4"
        arrays[tensor.name] = np.frombuffer(raw, dtype=kind).reshape(tensor.shape)
    result = Importance({}, {}, "checkpoint", tuple(filter(None, metadata.get("datasets", "").split("\n"))))
    chunks = metadata.get("chunks", "0")
    result.chunks = int(chunks) if chunks.isascii() and chunks.isdigit() and len(chunks) < 10 else 0
    for name, values in arrays.items():
        if name.endswith(_COUNTS):
            if name.removesuffix(_COUNTS) not in arrays:
                raise CheckpointError(f"{name} in {path.name} counts for a tensor that is not there")
            continue
        counts = arrays.get(name + _COUNTS)
        if counts is None or counts.shape != values.shape[:-1] or values.ndim not in (1, 2):
            raise CheckpointError(f"{name} in {path.name} and its counts have shapes that do not fit each other")
        add_entry(result, name, values, counts, path.name)
    return result
