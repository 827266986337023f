"""What all stores elsewhere share: headers and samples side by side, large reads as many parts, small files once."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from halfbyte.checkpoint import write_file_atomic
from halfbyte.checkpoint.files import MAX_SMALL_BYTES
from halfbyte.checkpoint.folder import belongs
from halfbyte.checkpoint.header import header_length, parse_header
from halfbyte.checkpoint.identity import PLACE_BYTES, WHOLE_BYTES, FileIdentity, sampled_places
from halfbyte.checkpoint.store import Headers
from halfbyte.errors import CheckpointError

STREAMS = 32
"""Requests at a time; one stream of a bucket or a CDN gives about 100 MB/s."""
PART_BYTES = 4 << 20
"""Bytes of one request; larger reads are several at a time."""
HEAD_BYTES = 1 << 16
"""Bytes of a file's beginning that are read before its header's length is known."""


@dataclass(frozen=True)
class RemoteFile:
    """A file's size, its etag, and the SHA-256 of its content where the store knows that."""

    bytes: int
    etag: str | None = None
    sha256: str | None = None


class RemoteStore(ABC):
    """A store that reads one range of a file per request; subclasses implement ``fetch``. Threads may share it.

    ``requests`` and ``bytes_read`` count what was fetched.
    """

    def __init__(self, place: str, files: Mapping[str, RemoteFile]) -> None:
        self.place = place
        self.root: Path | None = None
        self.files = dict(files)
        self.requests = self.bytes_read = 0
        self._pool = ThreadPoolExecutor(STREAMS, "halfbyte-fetch")
        self._heads: dict[str, Future[tuple[bytes, int]]] = {}
        self._small: dict[str, bytes] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock, self._filling = threading.Lock(), threading.Lock()

    @abstractmethod
    def fetch(self, name: str, offset: int, size: int) -> bytes:
        """Read exactly this range in one request; CheckpointError where that is impossible."""

    def get(self, name: str, offset: int, size: int) -> bytes:
        """Read a range that lies inside a file, and count it."""
        data = self.fetch(name, offset, size) if size else b""
        with self._lock:
            self.requests += 1
            self.bytes_read += len(data)
        return data

    def list(self) -> dict[str, int | None]:
        """List the visible files of the store and its direct folders; deeper folders as "a/b/"."""
        names: dict[str, int | None] = {}
        for name, file in self.files.items():
            parts = name.split("/")
            if any(part.startswith(".") for part in parts[:2]):
                continue
            if len(parts) > 2:
                names["/".join(parts[:2]) + "/"] = None
            else:
                names[name] = file.bytes
        return names

    def exists(self, name: str) -> bool:
        """Whether the store had this file when it was listed."""
        return name in self.files

    def is_file(self, name: str) -> bool:
        """Whether the store had this file when it was listed."""
        return name in self.files

    def check(self, name: str) -> None:  # noqa: B027  nothing to do in any of these stores
        """Do nothing: there are no links."""

    def refuse_dead_links(self) -> None:  # noqa: B027
        """Do nothing: there are no links."""

    def read_small(self, name: str) -> bytes:
        """Read a whole small file, once."""
        size = self._file(name).bytes
        if size > MAX_SMALL_BYTES:
            raise CheckpointError(
                f"{self.place}/{name} has {size} bytes; {MAX_SMALL_BYTES} are the limit for such a file"
            )
        if name not in self._small:
            content = bytearray(size)
            self.read_into(name, memoryview(content), 0)
            self._small[name] = bytes(content)
        return self._small[name]

    def read_into(self, name: str, view: memoryview, offset: int) -> int:
        """Fill ``view`` from ``offset``, in parts side by side."""
        size = max(0, min(len(view), self._file(name).bytes - offset))
        if size <= PART_BYTES:
            view[:size] = self.get(name, offset, size)
            return size

        def part(start: int) -> None:
            stop = min(start + PART_BYTES, size)
            view[start:stop] = self.get(name, offset + start, stop - start)

        for done in [self._pool.submit(part, start) for start in range(0, size, PART_BYTES)]:
            done.result()
        return size

    def announce(self, names: Sequence[str]) -> None:
        """Begin to read the headers of these files, all side by side."""
        for name in names:
            if name in self.files and name not in self._heads:
                self._heads[name] = self._pool.submit(self._head, name)

    def header(self, name: str) -> Headers:
        """Read and parse the header of a safetensors file."""
        self._file(name)
        self.announce([name])
        raw, size = self._heads.pop(name).result()
        tensors, metadata = parse_header(raw, name, size)
        return tensors, metadata, size

    def identify(self, name: str) -> FileIdentity:
        """Tell who a file was when the store was listed; every read checks that it still is."""
        file = self._file(name)
        return FileIdentity(file.bytes, 0, 0, 0, file.etag)

    def samples(self, names: Sequence[str]) -> dict[str, str]:
        """Hash small files, or places spread over large ones, side by side."""
        parts = {name: self._sample_parts(name) for name in names}
        digests: dict[str, str] = {}
        for name in names:
            digest = hashlib.sha256()
            for part in parts[name]:
                digest.update(part.result() if isinstance(part, Future) else part)
            known = self.files[name].sha256
            digests[name] = known if known and self.files[name].bytes <= WHOLE_BYTES else digest.hexdigest()
        return digests

    def sha256(self, name: str) -> str:
        """Hash a whole file, unless the store knows the hash of its content."""
        file = self._file(name)
        if file.sha256:
            return file.sha256
        digest, step = hashlib.sha256(), 8 * PART_BYTES
        buffer = memoryview(bytearray(min(step, file.bytes)))
        for offset in range(0, file.bytes, step):
            digest.update(buffer[: self.read_into(name, buffer, offset)])
        return digest.hexdigest()

    def copy(self, name: str, target: Path) -> str:
        """Copy a small file to this machine, completely or not at all."""
        content = self.read_small(name)
        write_file_atomic(target, content)
        return hashlib.sha256(content).hexdigest()

    def folder(self) -> Path:
        """A temporary folder with everything but weights; it vanishes with the store."""
        with self._filling:  # a second thread waits until everything is there
            if self._folder is None:
                made = tempfile.TemporaryDirectory(prefix="halfbyte-")
                for name, size in self.list().items():
                    if size is not None and belongs(name, size):
                        self.copy(name, Path(made.name) / name)
                self._folder = made
        return Path(self._folder.name)

    def _file(self, name: str) -> RemoteFile:
        try:
            return self.files[name]
        except KeyError:
            raise CheckpointError(f"there is no {name} in {self.place}") from None

    def _head(self, name: str) -> tuple[bytes, int]:
        """The JSON of a header, without its length, and the file's size."""
        size = self._file(name).bytes
        first = self.get(name, 0, min(HEAD_BYTES, size))
        length = header_length(first[:8], name, size)
        raw = first[8 : 8 + length]
        if len(raw) < length:
            raw += self.get(name, 8 + len(raw), length - len(raw))
        return raw, size

    def _sample_parts(self, name: str) -> Sequence[Future[bytes] | bytes]:
        file = self._file(name)
        if file.bytes > WHOLE_BYTES:
            get = partial(self.get, name, size=PLACE_BYTES)
            return [str(file.bytes).encode(), *(self._pool.submit(get, at) for at in sampled_places(file.bytes))]
        return [] if file.sha256 else [self._pool.submit(self.get, name, 0, file.bytes)]

    def __getstate__(self) -> dict[str, object]:
        """Everything but threads and caches, so that a plan can be sent to other processes."""
        hidden = ("_pool", "_heads", "_small", "_folder", "_lock", "_filling")
        return {key: value for key, value in vars(self).items() if key not in hidden}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Begin with new threads and empty caches."""
        vars(self).update(state)
        self._pool = ThreadPoolExecutor(STREAMS, "halfbyte-fetch")
        self._heads, self._small, self._folder = {}, {}, None
        self._lock, self._filling = threading.Lock(), threading.Lock()
