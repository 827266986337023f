"""Inventory: what a checkpoint holds, from headers alone. No weight is read."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.adapter import check_no_lora
from halfbyte.checkpoint.config import check_config, read_config
from halfbyte.checkpoint.dtypes import nbytes
from halfbyte.checkpoint.files import check_unicode, collector_paused, parse_object, printable, read_small
from halfbyte.checkpoint.folder import Contents, scan
from halfbyte.checkpoint.foreign import check_plain
from halfbyte.checkpoint.gguf_header import find_gguf, read_gguf
from halfbyte.checkpoint.header import TensorInfo, check_shape
from halfbyte.checkpoint.identity import FileIdentity, identities
from halfbyte.checkpoint.source import resolve
from halfbyte.checkpoint.store import LocalStore, Store
from halfbyte.errors import CheckpointError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_EXPANDED = 10_000_000


@dataclass(eq=False)
class Inventory:
    """Names, dtypes, shapes and positions of every tensor of a checkpoint.

    tensors: ordered by file, then offset; config: config.json, {} without one; side_files: files that travel
    along unchanged, name -> bytes; root: the folder; remote: the store, where that is not a folder of this machine;
    ignored_files: weights in the folder that are not part of this checkpoint, and folders too deep to be copied
    ("a/b/"); meta: what an index or an inventory file says besides; files: weight file -> bytes; metadata: weight
    file -> its __metadata__; source: what the user typed; revision: the hub's commit; ggml_types: tensor -> ggml
    type, for GGUF files alone, whose blocks are U8 here; identities: who the weight and side files are, as they were
    before their headers were read.
    """

    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    root: Path | None = None
    remote: Store | None = None
    side_files: dict[str, int] = field(default_factory=dict)
    side_file_bytes: int = 0
    ignored_files: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    source: str = ""
    revision: str | None = None
    ggml_types: dict[str, str] = field(default_factory=dict)
    identities: dict[str, FileIdentity] = field(default_factory=dict)

    @classmethod
    def open(cls, src: str | Path, revision: str | None = None) -> Inventory:
        """Read the headers of a local folder, a .safetensors or .gguf file, or a hub id (fetched to the hub's cache).

        CheckpointError, with the file or tensor named, when anything is missing, damaged or ambiguous.
        """
        resolved = resolve(src, revision)
        gguf = find_gguf(resolved.root, resolved.file)
        if gguf:
            headers = read_gguf(resolved.root, gguf)
            return cls(
                tensors=headers.tensors,
                config=headers.config,
                root=resolved.root,
                meta={"gguf": headers.metadata},
                files=headers.files,
                source=printable(str(src)),
                revision=resolved.revision,
                ggml_types=headers.types,
                identities=identities(resolved.root, headers.files),
            )
        return cls.from_store(LocalStore(resolved.root), printable(str(src)), resolved.revision, resolved.file)

    @classmethod
    def from_store(cls, store: Store, source: str, revision: str | None = None, only: str | None = None) -> Inventory:
        """Read the headers of the safetensors files of a store, or of the ``only`` one that is named.

        ``source``: the store as the user named it; ``revision``: the hub's commit.
        """
        contents = scan(store, only)
        present = [name for name in contents.weights if store.is_file(name)]
        store.announce(contents.weights)
        files_then = {name: store.identify(name) for name in [*present, *contents.side_files]}
        tensors, metadata, files = _read_headers(store, contents)
        if not tensors:
            raise CheckpointError(f"{source} holds no tensor")
        check_no_lora(store, contents.weights[0], tensors)
        return cls(
            tensors=tensors,
            config=read_config(store),
            root=store.root,
            remote=None if store.root else store,
            side_files=contents.side_files,
            side_file_bytes=sum(contents.side_files.values()),
            ignored_files=contents.ignored,
            meta=contents.index_metadata,
            files=files,
            metadata=metadata,
            source=source,
            revision=revision,
            identities=files_then,
        )

    @classmethod
    @collector_paused()
    def from_json(cls, path: str | Path) -> Inventory:
        """Load {"config", "meta", "tensors": {name: [dtype, shape]}}: a checkpoint without its weights.

        Ranges in names ("layers.{0..60}.experts.{0..383}") stand for every combination. All tensors lie one
        after the other in a file named ""; root is None.
        """
        path = Path(path)
        table = parse_object(read_small(path), path.name)
        config, meta, entries = table.get("config", {}), table.get("meta", {}), table.get("tensors")
        if not isinstance(config, dict) or not isinstance(meta, dict) or not isinstance(entries, dict):
            raise CheckpointError(f"{path.name} must hold the objects config, meta and tensors")
        check_unicode(entries, path.name)
        check_plain(meta, path.name)
        check_config(config, f"config of {path.name}")
        side_bytes = meta.get("side_file_bytes", 0)
        if type(side_bytes) is not int or side_bytes < 0:
            raise CheckpointError(f"meta.side_file_bytes in {path.name} must be a number of bytes")
        tensors: dict[str, TensorInfo] = {}
        offset = 0
        for pattern, entry in entries.items():
            what = f"tensor {pattern} in {path.name}"
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
                raise CheckpointError(f"{what} must be [dtype, shape]")
            dtype, shape = entry[0], entry[1]
            check_shape(shape, what)
            try:
                size = nbytes(dtype, shape)
            except CheckpointError as error:
                raise CheckpointError(f"{what}: {error}") from error
            for name in _expand(pattern, path.name, _MAX_EXPANDED - len(tensors)):
                if name in tensors:
                    raise CheckpointError(f"tensor {name} appears twice in {path.name}")
                tensors[name] = TensorInfo(name, dtype, tuple(shape), "", offset, size)
                offset += size
        if not tensors:
            raise CheckpointError(f"{path.name} holds no tensor")
        return cls(
            tensors=tensors,
            config=config,
            meta=meta,
            side_file_bytes=side_bytes,
            files={"": offset},
            source=str(path),
        )

    @property
    def store(self) -> Store:
        """Where the files lie; CheckpointError for an inventory without weights."""
        if self.remote is not None:
            return self.remote
        if self.root is None:
            raise CheckpointError(f"{self.source} is an inventory without weights, so nothing can be read")
        return LocalStore(self.root)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without headers and side files."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over names, dtypes, shapes, files, offsets and config; the folder does not matter."""
        rows = [(t.name, t.dtype, t.shape, t.file, t.offset) for t in self.tensors.values()]
        digest = hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode())
        digest.update(json.dumps(self.config, sort_keys=True, separators=(",", ":")).encode())
        return digest.hexdigest()


@collector_paused()
def _read_headers(
    store: Store, contents: Contents
) -> tuple[dict[str, TensorInfo], dict[str, dict[str, str]], dict[str, int]]:
    """(tensors, metadata by file, bytes by file) of all weight files, compared with the index."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, dict[str, str]] = {}
    files: dict[str, int] = {}
    for file in contents.weights:
        store.check(file)
        if contents.index is not None and not store.exists(file):
            raise CheckpointError(f"shard {file} is named by the index but is missing from {store.place}")
        infos, metadata[file], files[file] = store.header(file)
        for info in infos:
            if contents.index is not None and info.name in tensors and info.name in contents.index:
                # the index says which of two copies counts
                placed = contents.index[info.name]
                if placed in (file, tensors[info.name].file) and tensors[info.name].file != file:
                    other = tensors[info.name].file if placed == file else file
                    contents.ignored.append(f"{other}: {info.name} (the index takes the one in {placed})")
                    if placed != file:
                        continue
                    del tensors[info.name]
            if info.name in tensors:
                raise CheckpointError(f"tensor {info.name} is in both {tensors[info.name].file} and {file}")
            tensors[info.name] = info
    if contents.index is not None:
        _compare_with_index(tensors, contents.index)
    return tensors, metadata, files


def _compare_with_index(tensors: dict[str, TensorInfo], index: dict[str, str]) -> None:
    for name, file in index.items():
        info = tensors.get(name)
        if info is None:
            raise CheckpointError(f"tensor {name} is not in {file}, where the index places it, nor in any other shard")
        if info.file != file:
            raise CheckpointError(f"tensor {name} is in {info.file}, but the index places it in {file}")
    if len(index) < len(tensors):
        info = next(t for t in tensors.values() if t.name not in index)
        raise CheckpointError(f"tensor {info.name} in {info.file} is not in the index; the index is incomplete")


def _expand(pattern: str, what: str, budget: int) -> Iterator[str]:
    """All names of a pattern, the last range counting fastest."""
    if "{" not in pattern:
        return iter((pattern,))
    parts = _RANGE.split(pattern)  # text, first, last, text, first, last, ..., text
    ranges = [range(int(a), int(b) + 1) for a, b in zip(parts[1::3], parts[2::3], strict=True)]
    count = 1
    for numbers in ranges:
        count *= max(numbers.stop - numbers.start, 0)
    if not count or count > budget:
        raise CheckpointError(f"the ranges of {pattern} in {what} stand for no name or for more than {_MAX_EXPANDED}")
    template = "%d".join(text.replace("%", "%%") for text in parts[0::3])
    return (template % numbers for numbers in itertools.product(*ranges))
