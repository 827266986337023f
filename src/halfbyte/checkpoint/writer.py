"""Writing files so that they are either complete or absent: temporary name, preallocation, fsync, rename."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import shutil
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from halfbyte.checkpoint.files import forget_pages, open_regular, read_into, reason
from halfbyte.checkpoint.layout import Layout
from halfbyte.checkpoint.stream_hash import StreamHash
from halfbyte.errors import CheckpointError, OutputError

_LARGEST_WRITE = 1 << 30
_COPY_CHUNK = 1 << 24
# the disk gets to work after so many bytes, and has little left to do at the end
_WRITE_BACK_BYTES = 1 << 24
# begun and neither finished nor given up: an interrupt may fall between any two steps of the code that would do so
_unfinished: set[_AtomicFile] = set()


class _AtomicFile:
    """A preallocated ``<path>.partial`` that becomes ``path`` at commit or vanishes.

    ``attempt`` makes the temporary name unique, so that several processes may write the same bytes at once: the first
    one gives the file its name, and the others find it there.
    """

    def __init__(self, path: Path, total: int, attempt: str = "") -> None:
        self.path = path
        self.total = total
        self.attempt = attempt
        self.partial = path.with_name(partial_name(path.name, attempt))
        self._descriptor: int | None = None
        self._ours = False
        self._fresh = 0
        self._lock = threading.Lock()
        self.process = os.getpid()
        _unfinished.add(self)
        try:
            self.partial.unlink(missing_ok=True)  # left by a killed run
            self._ours = True
            self._descriptor = os.open(
                self.partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666
            )
            _allocate(self._descriptor, total, path)
            self.hash = StreamHash(self._descriptor)
        except OSError as error:
            self._ours = self._descriptor is not None  # else another process was quicker, or there is no file
            self.abort()
            raise self._error(error) from error

    def write(self, offset: int, data: memoryview) -> None:
        if self._descriptor is None:
            raise OutputError(f"{self.path} is closed already and cannot be written any more")
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done : done + _LARGEST_WRITE], offset + done)
            self.hash.add(offset, data)
        except OSError as error:
            raise self._error(error) from error
        with self._lock:
            self._fresh += len(data)
            enough = self._fresh >= _WRITE_BACK_BYTES
            if enough:
                self._fresh = 0
        # what is not hashed yet is still to be read back
        if enough and self.hash.hashed:
            forget_pages(self._descriptor, 0, self.hash.hashed)

    def commit(self) -> str:
        """Make the file durable under its name; the SHA-256 of its bytes."""
        if self._descriptor is None:
            raise OutputError(f"{self.path} is closed already and cannot be committed")
        try:
            sha256 = self.hash.finish(self.total)
            os.fsync(self._descriptor)
            held, there = os.fstat(self._descriptor), os.stat(self.partial)
            self._ours = (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino)
            self._close()
            if not self._ours:
                raise OutputError(f"another process is writing {self.path} too; run only one at a time")
            if self.attempt:
                self._link()
            else:
                os.replace(self.partial, self.path)
            self._ours = False
            _unfinished.discard(self)
            sync_folder(self.path.parent)
        except OSError as error:
            self.abort()
            raise self._error(error) from error
        return sha256

    def _link(self) -> None:
        """Give the file its name, unless another process has written it meanwhile."""
        try:
            os.link(self.partial, self.path)
        except FileExistsError:
            if self.path.stat().st_size != self.total:
                raise OutputError(f"{self.path} is there already with another size; remove it and run again") from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            os.replace(self.partial, self.path)  # no hard links on this file system
            return
        self.partial.unlink(missing_ok=True)

    def abort(self) -> None:
        self._close()
        if self._ours:
            self.partial.unlink(missing_ok=True)
            self._ours = False
        _unfinished.discard(self)

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def _error(self, error: OSError) -> OutputError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(f"the disk has no room for the {self.total} bytes of {self.path}; free some space")
        return OutputError(f"{self.path} cannot be written ({reason(error)})")


class ShardWriter:
    """Writes one planned file at known offsets, from any thread, in any order.

    The file is preallocated under a temporary name, so a full disk is an OutputError here, not hours later.
    It gets its real name in :meth:`commit`; leaving the context without a commit removes it. Writers of the same bytes
    in several processes each need an ``attempt`` of their own.
    """

    def __init__(self, path: str | Path, layout: Layout, attempt: str = "") -> None:
        self.layout = layout
        self.path = Path(path)
        self._file = _AtomicFile(self.path, layout.total, attempt)
        self._written: list[tuple[int, int]] = list(layout.gaps)
        self._lock = threading.Lock()
        try:
            self._file.write(0, memoryview(layout.header))
            for start, end in layout.gaps:
                self._file.hash.add(start, memoryview(bytes(end - start)))
        except OutputError:
            self.abort()
            raise

    def write_at(self, offset: int, buffer: Any) -> None:
        """Write bytes, or the bytes of a NumPy array (any dtype), at an absolute offset behind the header."""
        data = bytes_of(buffer)
        end = offset + len(data)
        if offset < len(self.layout.header) or end > self.layout.total:
            raise OutputError(f"bytes {offset} to {end} are outside the data of {self.path}")
        self._file.write(offset, data)
        with self._lock:
            self._written.append((offset, end))

    def commit(self) -> str:
        """Make the file durable and give it its name; returns the SHA-256 (hex) of its bytes.

        OutputError when a byte of it was never written.
        """
        reached = len(self.layout.header)
        for start, end in sorted(self._written):
            if start > reached:
                break
            reached = max(reached, end)
        if reached < self.layout.total:
            self.abort()
            raise OutputError(f"byte {reached} of {self.path} was never written, so the file is not complete")
        return self._file.commit()

    def abort(self) -> None:
        """Remove the temporary file. Only once no thread writes any more; harmless after a commit."""
        self._file.abort()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


@atexit.register
def remove_unfinished() -> None:
    """Remove the files that this process began and neither finished nor gave up; only once no thread writes."""
    for file in list(_unfinished):
        if file.process == os.getpid():  # a fork knows its parent's files too
            with contextlib.suppress(OSError):
                file.abort()


def partial_name(name: str, attempt: str = "") -> str:
    """The temporary name of a file while it is written."""
    return f"{name}.{attempt}.partial" if attempt else f"{name}.partial"


def write_file_atomic(path: str | Path, data: bytes) -> None:
    """Write a small file (config, index) completely or not at all, with its folder; or OutputError."""
    path = Path(path)
    _make_parent(path)
    file = _AtomicFile(path, len(data))
    try:
        file.write(0, memoryview(data))
        file.commit()
    finally:
        file.abort()


def copy_file_atomic(src: str | Path, dst: str | Path) -> str:
    """Copy a file bit for bit, completely or not at all; returns its SHA-256 (hex). Links are followed."""
    source, target = Path(src), Path(dst)
    descriptor, size = open_regular(source)
    try:
        _make_parent(target)
        file = _AtomicFile(target, size)
        try:
            buffer = memoryview(bytearray(min(size, _COPY_CHUNK)))
            for offset in range(0, size, _COPY_CHUNK):
                part = buffer[: min(_COPY_CHUNK, size - offset)]
                if read_into(descriptor, part, offset) < len(part):
                    raise CheckpointError(f"{source} became shorter while it was copied")
                file.write(offset, part)
            sha256 = file.commit()
        finally:
            file.abort()
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read ({reason(error)})") from error
    finally:
        os.close(descriptor)
    return sha256


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable; some network file systems cannot, and do it by themselves."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {path.parent} cannot be made ({reason(error)})") from error


def _allocate(descriptor: int, total: int, path: Path) -> None:
    """Reserve ``total`` bytes; OSError or OutputError when the disk does not have them."""
    if not total:
        return
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, total)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV):
                raise
    # Nothing is reserved here, so at least compare with what is free now.
    if shutil.disk_usage(path.parent).free < total:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(descriptor, total)


def bytes_of(buffer: Any) -> memoryview:
    """The bytes of a buffer, or of a NumPy array of any dtype and layout, in order."""
    if isinstance(buffer, np.ndarray):
        # Through uint8, since the types of ml_dtypes have no buffer interface; reshape(-1) lets scalars pass.
        return np.ascontiguousarray(buffer).reshape(-1).view(np.uint8).data
    return memoryview(buffer).cast("B")
