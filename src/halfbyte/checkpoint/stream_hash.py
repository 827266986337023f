"""SHA-256 of a file whose parts are written in any order: hashed while they are written, in the order of the file."""

from __future__ import annotations

import hashlib
import os
import threading

from halfbyte.checkpoint.files import read_into

_CHUNK = 1 << 20


class StreamHash:
    """The SHA-256 of a file that grows by ranges from any thread.

    A part that continues what is hashed already is hashed from memory. Parts that come early are read back from
    the page cache when the gap before them is closed; the thread that closes it does so while the others go on.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._sha = hashlib.sha256()
        self._lock = threading.Lock()
        self._waiting: dict[int, int] = {}
        self._busy = False
        self._broken = False
        self.hashed = 0
        """How many bytes from the beginning on are hashed."""

    def add(self, offset: int, data: memoryview) -> None:
        """Note that ``data`` stands in the file at ``offset`` now."""
        end = offset + len(data)
        with self._lock:
            if offset < self.hashed or offset in self._waiting:
                self._broken = True  # written twice: only the file itself knows its bytes
            if self._broken or not data:
                return
            if self._busy or offset != self.hashed:
                self._waiting[offset] = end
                return
            self._busy = True
        self._sha.update(data)
        self._advance(end)

    def finish(self, total: int) -> str:
        """The hash in hex, once every byte of ``total`` has been written."""
        if self._broken or self.hashed != total:
            self._sha, self.hashed = hashlib.sha256(), 0
            self._read(0, total)
        return self._sha.hexdigest()

    def _advance(self, reached: int) -> None:
        """Hash what had to wait; give the turn back when there is a gap."""
        while True:
            with self._lock:
                self.hashed = end = reached
                while end in self._waiting:
                    end = self._waiting.pop(end)
                if end == reached or self._broken:
                    self._busy = False
                    return
            self._read(reached, end)
            reached = end

    def _read(self, start: int, stop: int) -> None:
        buffer = memoryview(bytearray(min(_CHUNK, stop - start)))
        for offset in range(start, stop, _CHUNK):
            part = buffer[: min(_CHUNK, stop - offset)]
            count = read_into(self._descriptor, part, offset)
            if count < len(part):
                raise OSError(f"the file ends at byte {offset + count}")
            self._sha.update(part)


def hash_file(descriptor: int, size: int) -> str:
    """SHA-256 (hex) of the first ``size`` bytes of an open file; OSError where it is shorter."""
    return StreamHash(descriptor).finish(size)


def hash_path(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file; OSError where it cannot be read."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        return hash_file(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
