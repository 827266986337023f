"""Which files a source consists of at a moment, so that one that changes meanwhile is noticed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.checkpoint.files import open_regular, read_into, reason
from halfbyte.checkpoint.stream_hash import hash_file
from halfbyte.errors import CheckpointError, UnconvertibleError

if TYPE_CHECKING:
    from halfbyte.checkpoint.store import Store

WHOLE_BYTES = 1 << 24
"""Files up to this size are hashed completely, larger ones at places spread over them."""
_PLACES, PLACE_BYTES = 48, 1 << 16
# large files in the cache of huggingface_hub are named by their SHA-256
_BLOB = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileIdentity:
    """A file's size, when its content and its status last changed, its inode, and the hub's etag if that is known."""

    bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    etag: str | None = None


def identify(path: Path) -> FileIdentity:
    """The identity of a file as it is now; CheckpointError where there is none."""
    try:
        status = path.stat()
        blob = Path(os.readlink(path)) if path.is_symlink() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)})") from error
    etag = blob.name if blob is not None and blob.parent.name == "blobs" else None
    return FileIdentity(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, etag)


def identities(root: Path, names: Iterable[str]) -> dict[str, FileIdentity]:
    """The identity of every file of a folder that is named."""
    return {name: identify(root / name) for name in names}


def sampled_places(size: int) -> list[int]:
    """Where the parts of ``PLACE_BYTES`` of a large file begin that its sample is made of, after its size."""
    return [(size - PLACE_BYTES) * place // (_PLACES - 1) for place in range(_PLACES)]


def sample(path: Path) -> str:
    """SHA-256 (hex) of a small file, or of the size, both ends and places in between of a large one."""
    descriptor, size = open_regular(path)
    try:
        if size <= WHOLE_BYTES:
            return hash_file(descriptor, size)
        digest = hashlib.sha256(str(size).encode())
        for place in sampled_places(size):
            part = memoryview(bytearray(PLACE_BYTES))
            digest.update(part[: read_into(descriptor, part, place)])
        return digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)})") from error
    finally:
        os.close(descriptor)


class SourceIdentity:
    """All files that a conversion reads: who they were when the plan was made, and what samples of them say.

    UnconvertibleError if one of them is another one by now.
    """

    def __init__(self, store: Store, files: Mapping[str, FileIdentity]) -> None:
        self.files = dict(files)
        self._places: dict[str, tuple[Store, str]] = {name: (store, name) for name in files}
        self.check()
        self.samples = store.samples(list(files))

    def add(self, other: SourceIdentity, prefix: str) -> None:
        """Take files of another folder in, under names with a prefix."""
        for name, place in other._places.items():
            self._places[prefix + name] = place
            self.files[prefix + name], self.samples[prefix + name] = other.files[name], other.samples[name]

    def check(self) -> None:
        """UnconvertibleError if a file is no longer what it was when the plan was made."""
        for name, identity in self.files.items():
            store, file = self._places[name]
            if store.identify(file) != identity:
                raise UnconvertibleError(
                    f"{store.place}/{file} changed after the plan was made, so the output would mix two models; start "
                    "again with files that stay as they are"
                )

    def to_dict(self) -> dict[str, Any]:
        """The same for the journal."""
        return {name: {**asdict(self.files[name]), "sample": self.samples[name]} for name in self.files}

    def digest(self, names: Iterable[str]) -> str:
        """SHA-256 (hex) of the sizes and samples of some files; the same wherever they lie."""
        total = hashlib.sha256()
        for name in sorted(names):
            total.update(f"{name}\0{self.files[name].bytes}\0{self.samples[name]}\n".encode())
        return total.hexdigest()

    def changed(self, before: Mapping[str, Any]) -> str | None:
        """The first file that is not what a journal says of it, None if all are."""
        for name in sorted({*before, *self.files}):
            entry = before.get(name)
            if name not in self.files or not isinstance(entry, dict) or not self._same(name, entry):
                return name
        return None

    def _same(self, name: str, entry: Mapping[str, Any]) -> bool:
        now = self.files[name]
        if (entry.get("bytes"), entry.get("sample")) != (now.bytes, self.samples[name]):
            return False
        if now.bytes <= WHOLE_BYTES:
            return True  # the sample is all of it
        if all(entry.get(key) == value for key, value in asdict(now).items()):
            return True
        etag = entry.get("etag")
        # the cache was fetched again: where the name is the content's hash, the content can prove itself
        store, file = self._places[name]
        return bool(etag and etag == now.etag and _BLOB.fullmatch(etag) and store.sha256(file) == etag)
