"""Small safetensors files written byte by byte, so that tests can also write wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """Write a file with exactly this header and data; ``length`` overrides what the prefix claims."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def write_floats(path: Path, *names: str, rows: int = 2) -> Path:
    """A file with one F32 tensor [rows, 2] per name."""
    size = rows * 8
    table = {name: entry("F32", [rows, 2], i * size, (i + 1) * size) for i, name in enumerate(names)}
    return write_raw(path, table, bytes(range(256))[: size * len(names)].ljust(size * len(names), b"\0"))


def write_index(folder: Path, weight_map: dict[str, str], **metadata: Any) -> None:
    text = json.dumps({"metadata": metadata, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
