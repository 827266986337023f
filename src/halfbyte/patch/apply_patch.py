"""``apply``: the tuned checkpoint from its base and a patch, exact to the bit."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import numpy as np
import zstandard

from halfbyte.checkpoint import Inventory, Layout, Reader, ShardWriter, copy_file_atomic, write_file_atomic
from halfbyte.checkpoint.config import CONFIG
from halfbyte.checkpoint.files import reason
from halfbyte.checkpoint.stream_hash import hash_path
from halfbyte.checkpoint.writer import sync_folder
from halfbyte.errors import CheckpointError, OutputError
from halfbyte.patch.make_patch import CHUNK
from halfbyte.patch.manifest import Manifest, Region, Target, read_manifest

_MAX_FILE = 1 << 46
_MAX_SMALL = 1 << 30


@dataclass
class Applied:
    """The outcome; ``resumed``: files that an interrupted run had finished."""

    out: Path
    files: list[str] = field(default_factory=list)
    nbytes: int = 0
    resumed: int = 0


def apply_patch(
    base: str | Path, patch: str | Path, out: str | Path, progress: Callable[[int], None] | None = None
) -> Applied:
    """Write the target of a patch to the new folder ``out``; every file is checked against its SHA-256.

    Continues where an interrupted run stopped. CheckpointError where the base is not the one that the patch was made
    from, or the patch is damaged; OutputError where ``out`` exists.
    """
    target = Path(out)
    if target.exists():
        raise OutputError(f"{target} exists already; name a new folder")
    old, difference = Inventory.open(base), Inventory.open(patch)
    manifest = read_manifest(difference)
    if old.root is None:
        raise CheckpointError(f"{base} is no folder of files; name the base checkpoint of the patch")
    _check_base(old.root, manifest, str(base))
    building = target.with_name(f"{target.name}.applying")
    result, report = Applied(target), progress or (lambda _: None)
    try:
        building.mkdir(parents=True, exist_ok=True)
        with Reader(old) as left, Reader(difference) as streams:
            # config.json last
            for item in sorted(manifest.targets, key=lambda item: item.name == CONFIG):
                done = building / item.name
                if done.is_file() and done.stat().st_size == item.size and hash_path(done) == item.sha256:
                    result.resumed += 1
                else:
                    _make(item, old, left, streams, done)
                result.files.append(item.name)
                result.nbytes += item.size
                report(item.size)
        os.rename(building, target)
        sync_folder(target.parent)
    except OSError as error:
        raise OutputError(f"{building} cannot be written ({reason(error)})") from error
    return result


def _check_base(root: Path, manifest: Manifest, name: str) -> None:
    for file, sha256 in manifest.base.items():
        path = root / file
        if not path.is_file():
            raise CheckpointError(f"{name} lacks {file}, which the patch needs; name the base that it was made from")
        if hash_path(path) != sha256:
            raise CheckpointError(
                f"{file} in {name} is not the file that the patch was made from; name that base checkpoint"
            )


def _make(item: Target, old: Inventory, left: Reader, streams: Reader, out: Path) -> None:
    """One file of the target; CheckpointError where it does not come out as the patch says."""
    assert old.root is not None
    if item.size > _MAX_FILE:
        raise CheckpointError(f"the patch says that {item.name} has {item.size:,} bytes; it is damaged")
    if item.kind == "same":
        if item.base not in {*old.files, *_names(old.root)}:
            raise CheckpointError(f"the patch takes {item.name} from {item.base!r}, which the base does not have")
        out.parent.mkdir(parents=True, exist_ok=True)
        found = copy_file_atomic(old.root / item.base, out)
    elif item.kind == "whole":
        content = b"".join(_unpacked(streams, item.stream, min(item.size, _MAX_SMALL), item.name))
        write_file_atomic(out, content)
        found = hash_path(out)
    else:
        found = _rebuild(item, old, left, streams, out)
    if found != item.sha256:
        out.unlink(missing_ok=True)
        raise CheckpointError(f"{item.name} does not come out as the patch says; the patch is damaged")


def _names(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def _rebuild(item: Target, old: Inventory, left: Reader, streams: Reader, out: Path) -> str:
    """A file of weights from its header and its tensors."""
    header = b"".join(_unpacked(streams, item.stream, item.header, item.name))
    regions = sorted(item.regions, key=lambda region: region.offset)
    ends = [item.header, *(region.offset + region.nbytes for region in regions)]
    starts = [*(region.offset for region in regions), item.size]
    gaps = tuple((a, b) for a, b in zip(ends, starts, strict=True) if b > a)
    if any(b < a for a, b in zip(ends, starts, strict=True)) or sum(b - a for a, b in gaps) > _MAX_SMALL:
        raise CheckpointError(f"the regions of {item.name} overlap or leave holes; the patch is damaged")
    out.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(out, Layout(header, [region.offset for region in regions], item.size, gaps)) as writer:
        for region in regions:
            offset = region.offset
            for part in _content(region, old, left, streams):
                writer.write_at(offset, part)
                offset += len(part)
        return writer.commit()


def _content(region: Region, old: Inventory, left: Reader, streams: Reader) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor of the target, in parts."""
    if not region.nbytes:
        return
    before = old.tensors.get(region.base)
    if region.base and (before is None or before.nbytes != region.nbytes):
        raise CheckpointError(f"the base has no tensor {region.base[:100]} of {region.nbytes:,} bytes")
    if not region.stream:
        if before is None:
            raise CheckpointError(f"the patch says nothing of the content of {region.name[:100]}; it is damaged")
        yield from left.chunks(before.name, CHUNK)
        return
    offset = 0
    for part in _unpacked(streams, region.stream, region.nbytes, region.name):
        if before is None:
            yield part
        else:
            other = np.frombuffer(left.chunk(before.name, offset, len(part)), np.uint8)
            yield np.bitwise_xor(np.frombuffer(part, np.uint8), other).tobytes()
        offset += len(part)


class _Packed(io.RawIOBase):
    """A stream of a patch as a file to read from."""

    def __init__(self, streams: Reader, name: str) -> None:
        super().__init__()
        self._streams, self._name, self._at = streams, name, 0
        self._size = streams.inventory.tensors[name].nbytes

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most ``size`` of them."""
        count = self._size - self._at if size < 0 else min(size, self._size - self._at)
        part = bytes(self._streams.chunk(self._name, self._at, count))
        self._at += count
        return part


def _unpacked(streams: Reader, name: str, size: int, what: str) -> Iterator[bytes]:
    """A stream in parts of at most CHUNK bytes; CheckpointError unless it holds exactly ``size`` bytes."""
    damaged = CheckpointError(f"the patch holds no stream of {size:,} bytes for {what[:100]}; it is damaged")
    if name not in streams.inventory.tensors:
        raise damaged
    left, packed = size, _Packed(streams, name)
    try:
        # no part is larger than asked for, whatever a stranger's stream would expand to
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(cast(IO[bytes], packed)) as unpacked:
            while part := unpacked.read(CHUNK):
                left -= len(part)
                if left < 0:
                    raise damaged
                yield part
    except zstandard.ZstdError as error:
        raise damaged from error
    if left:
        raise damaged
