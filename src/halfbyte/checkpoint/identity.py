"""Which files a source consists of at a moment, so that one that changes meanwhile is noticed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.files import open_regular, read_into, reason
from halfbyte.checkpoint.stream_hash import hash_file, hash_path
from halfbyte.errors import CheckpointError, UnconvertibleError

WHOLE_BYTES = 1 << 24
"""Files up to this size are hashed completely, larger ones at places spread over them."""
_PLACES, _PLACE_BYTES = 48, 1 << 16
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


def sample(path: Path) -> str:
    """SHA-256 (hex) of a small file, or of the size, both ends and places in between of a large one."""
    descriptor, size = open_regular(path)
    try:
        if size <= WHOLE_BYTES:
            return hash_file(descriptor, size)
        digest = hashlib.sha256(str(size).encode())
        last = size - _PLACE_BYTES
        for place in range(_PLACES):
            part = memoryview(bytearray(_PLACE_BYTES))
            digest.update(part[: read_into(descriptor, part, last * place // (_PLACES - 1))])
        return digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)})") from error
    finally:
        os.close(descriptor)


class SourceIdentity:
    """All files that a conversion reads: who they were when the plan was made, and what samples of them say.

    UnconvertibleError if one of them is another one by now.
    """

    def __init__(self, root: Path, files: Mapping[str, FileIdentity]) -> None:
        self.files = dict(files)
        self._paths = {name: root / name for name in files}
        self.check()
        self.samples = {name: sample(path) for name, path in self._paths.items()}

    def add(self, other: SourceIdentity, prefix: str) -> None:
        """Take files of another folder in, under names with a prefix."""
        for name, path in other._paths.items():
            self._paths[prefix + name] = path
            self.files[prefix + name], self.samples[prefix + name] = other.files[name], other.samples[name]

    def check(self) -> None:
        """UnconvertibleError if a file is no longer what it was when the plan was made."""
        for name, identity in self.files.items():
            if identify(self._paths[name]) != identity:
                raise UnconvertibleError(
                    f"{self._paths[name]} changed after the plan was made, so the output would mix two models; start "
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
        return bool(etag and etag == now.etag and _BLOB.fullmatch(etag) and hash_path(self._paths[name]) == etag)
