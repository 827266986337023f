"""``diff``: the patch that turns one checkpoint into another, tensor by tensor."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard

import halfbyte
from halfbyte.checkpoint import Inventory, Reader, ShardWriter, TensorInfo, build_header
from halfbyte.checkpoint.files import read_start, reason
from halfbyte.checkpoint.stream_hash import hash_path
from halfbyte.errors import CheckpointError, OutputError
from halfbyte.patch.manifest import KEY, Manifest, Region, Target

CHUNK = 1 << 22
LEVEL = 12
"""Of zstd: from here on, higher levels cost much more time than they save bytes on XORed codes."""


@dataclass
class Patch:
    """What was written: bytes of the patch and of the target, files and tensors that are the same, and that differ."""

    path: Path
    nbytes: int = 0
    target_bytes: int = 0
    same_files: int = 0
    same_tensors: int = 0
    changed_tensors: int = 0


@dataclass
class _Streams:
    """Compressed streams, one after the other in a temporary file."""

    file: IO[bytes]
    sizes: dict[str, int] = field(default_factory=dict)

    def add(self, parts: Iterator[Any]) -> str:
        """Compress parts to a new stream and give its name."""
        name, start = f"s{len(self.sizes):07d}", self.file.tell()
        # one thread and no checksum of its own: the same input gives the same bytes, and SHA-256 holds the result
        writer = zstandard.ZstdCompressor(level=LEVEL, write_content_size=False).stream_writer(self.file, closefd=False)
        for part in parts:
            writer.write(part)
        writer.flush(zstandard.FLUSH_FRAME)
        self.sizes[name] = self.file.tell() - start
        return name


def make_patch(
    base: str | Path, tuned: str | Path, out: str | Path, progress: Callable[[int], None] | None = None
) -> Patch:
    """Write what ``tuned`` has otherwise than ``base`` to the file ``out``; both are local checkpoints.

    Tensors of the same name, type and shape are XORed; all streams are compressed by zstd. ``progress`` gets bytes of
    the target. CheckpointError where a checkpoint cannot be read; OutputError where ``out`` cannot be written.
    """
    old, new = Inventory.open(base), Inventory.open(tuned)
    if old.root is None or new.root is None or old.ggml_types or new.ggml_types:
        raise CheckpointError("a patch needs two checkpoints of safetensors files")
    report, path = progress or (lambda _: None), Path(out)
    result = Patch(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as spool, Reader(old) as left, Reader(new) as right:
            streams = _Streams(spool)
            hashes = _Hashes(old)
            targets = [
                _weights(name, old, new, left, right, streams, hashes, result, report) for name in sorted(new.files)
            ]
            targets += [_whole(name, new, streams, hashes, result) for name in _others(new)]
            streams.add(iter(()))  # no patch is without a tensor, even if nothing differs
            manifest = Manifest(
                schema=1, made_by=f"halfbyte {halfbyte.__version__}", base=dict(hashes.used), targets=tuple(targets)
            )
            _assemble(path, streams, manifest)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({reason(error)})") from error
    result.nbytes = path.stat().st_size
    result.target_bytes = sum(target.size for target in targets)
    return result


class _Hashes:
    """SHA-256 of the base's files, computed when first needed; ``used`` are those that a patch relies on."""

    def __init__(self, base: Inventory) -> None:
        self._root = base.root
        self.by_size: dict[int, list[str]] = {}
        self._known: dict[str, str] = {}
        self.used: dict[str, str] = {}
        assert base.root is not None
        for name in (*base.files, *_others(base)):
            self.by_size.setdefault((base.root / name).stat().st_size, []).append(name)

    def of(self, name: str) -> str:
        """The hash of a file of the base."""
        assert self._root is not None
        if name not in self._known:
            self._known[name] = hash_path(self._root / name)
        return self._known[name]

    def use(self, name: str) -> None:
        """Note that the patch needs a file of the base."""
        self.used[name] = self.of(name)

    def same(self, sha256: str, size: int) -> str | None:
        """A file of the base with this content."""
        return next((name for name in self.by_size.get(size, ()) if self.of(name) == sha256), None)


def _others(inventory: Inventory) -> list[str]:
    """Files beside the weights, those that inventories read themselves included."""
    assert inventory.root is not None
    named = set(inventory.side_files)
    for path in inventory.root.iterdir():
        if path.is_file() and path.suffix == ".json" and path.name not in inventory.ignored_files:
            named.add(path.name)
    return sorted(named - set(inventory.files))


def _same(name: str, sha256: str, size: int, hashes: _Hashes, result: Patch) -> Target | None:
    """A file that the base has too, under any name."""
    twin = hashes.same(sha256, size)
    if twin is None:
        return None
    hashes.use(twin)
    result.same_files += 1
    return Target(name=name, sha256=sha256, size=size, kind="same", base=twin)


def _whole(name: str, new: Inventory, streams: _Streams, hashes: _Hashes, result: Patch) -> Target:
    """A small file: that of the base, or all of it."""
    assert new.root is not None
    path = new.root / name
    size, sha256 = path.stat().st_size, hash_path(path)
    if same := _same(name, sha256, size, hashes, result):
        return same

    def parts() -> Iterator[bytes]:
        with path.open("rb") as file:
            while part := file.read(CHUNK):
                yield part

    return Target(name=name, sha256=sha256, size=size, kind="whole", stream=streams.add(parts()))


def _weights(
    name: str,
    old: Inventory,
    new: Inventory,
    left: Reader,
    right: Reader,
    streams: _Streams,
    hashes: _Hashes,
    result: Patch,
    report: Callable[[int], None],
) -> Target:
    """A file of weights: its header, and each tensor beside that of the base."""
    assert new.root is not None
    path = new.root / name
    size, sha256 = path.stat().st_size, hash_path(path)
    if same := _same(name, sha256, size, hashes, result):
        report(size)
        return same
    infos = sorted((i for i in new.tensors.values() if i.file == name), key=lambda i: i.offset)
    header = infos[0].offset
    start = streams.add(iter([read_start(path, header)]))
    regions = []
    for info in infos:
        before = old.tensors.get(info.name)
        if before is not None and (before.dtype, before.shape) != (info.dtype, info.shape):
            before = None
        if before is not None:
            hashes.use(before.file)
        regions.append(_region(info, before, left, right, streams, result))
        report(info.nbytes)
    return Target(
        name=name, sha256=sha256, size=size, kind="regions", stream=start, header=header, regions=tuple(regions)
    )


def _region(
    info: TensorInfo, before: TensorInfo | None, left: Reader, right: Reader, streams: _Streams, result: Patch
) -> Region:
    place: dict[str, Any] = {"name": info.name, "offset": info.offset, "nbytes": info.nbytes}
    if before is not None and _equal(info, left, right):
        result.same_tensors += 1
        return Region(**place, base=before.name)
    result.changed_tensors += 1
    parts = right.chunks(info.name, CHUNK) if before is None else _xor(info, left, right)
    return Region(**place, base=before.name if before else "", stream=streams.add(parts))


def _equal(info: TensorInfo, left: Reader, right: Reader) -> bool:
    pairs = zip(left.chunks(info.name, CHUNK), right.chunks(info.name, CHUNK), strict=True)
    return all(a == b for a, b in pairs)


def _xor(info: TensorInfo, left: Reader, right: Reader) -> Iterator[bytes]:
    for a, b in zip(left.chunks(info.name, CHUNK), right.chunks(info.name, CHUNK), strict=True):
        yield np.bitwise_xor(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)).tobytes()


def _assemble(path: Path, streams: _Streams, manifest: Manifest) -> None:
    """The manifest and all streams as one safetensors file."""
    entries = [(name, "U8", (size,)) for name, size in streams.sizes.items()]
    layout = build_header(entries, {"format": "pt", KEY: manifest.to_text()})
    streams.file.seek(0, os.SEEK_SET)
    with ShardWriter(path, layout) as writer:
        offset = len(layout.header)
        while part := streams.file.read(CHUNK):
            writer.write_at(offset, part)
            offset += len(part)
        writer.commit()
