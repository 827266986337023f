"""Reading tensors, or rows of them, as NumPy arrays by byte ranges."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from halfbyte.checkpoint.dtypes import numpy_dtype
from halfbyte.checkpoint.files import forget_pages, is_cached, open_regular, read_into, reason
from halfbyte.checkpoint.header import TensorInfo
from halfbyte.checkpoint.inventory import Inventory
from halfbyte.errors import CheckpointError

# smaller reads leave their pages in the cache
_FORGET_BYTES = 1 << 20


class Ranges(Protocol):
    """Reads ranges of files by name, as a ``Store`` does."""

    def read_into(self, name: str, view: memoryview, offset: int) -> int:
        """Fill ``view`` from ``offset``; returns the bytes read, fewer only at the end of the file."""


class Reader:
    """Reads the tensors of an inventory. Threads may share it; a context manager that closes its files.

    ``ahead`` takes the place of a store that is not on this machine, and may have read already what is asked for.
    A file that was not in the system's page cache before does not fill it: what has been read is dropped there.
    """

    def __init__(self, inventory: Inventory, ahead: Ranges | None = None) -> None:
        self.inventory = inventory
        self._store = inventory.store
        self._root = inventory.root
        self._ahead = ahead
        self._descriptors: dict[str, int] = {}
        self._uncached: set[int] = set()
        self._lock = threading.Lock()
        self._closed = False

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> np.ndarray[Any, np.dtype[Any]]:
        """Rows start:stop of the leading axis (default: all) in the stored dtype, as a fresh writable array.

        Only the bytes of these rows are read. CheckpointError for an unknown tensor, rows outside of it,
        packed sub-byte dtypes, or a file that ends early.
        """
        info = self._info(name)
        dtype = numpy_dtype(info.dtype)
        shape, offset, size = info.shape, info.offset, info.nbytes
        if start is not None or stop is not None:
            rows = shape[0] if shape else 0
            first = 0 if start is None else start
            last = rows if stop is None else stop
            if not shape or not 0 <= first <= last <= rows:
                raise CheckpointError(f"rows {first}:{last} are outside tensor {name} of shape {list(shape)}")
            row = size // rows if rows else 0
            shape, offset, size = (last - first, *shape[1:]), offset + first * row, (last - first) * row
        return self._fetch(info, offset, size).view(dtype).reshape(shape)

    def read_into(self, name: str, out: np.ndarray[Any, np.dtype[Any]]) -> None:
        """A whole tensor into an array of its shape; without a copy where that is contiguous and of its dtype."""
        info = self._info(name)
        dtype = numpy_dtype(info.dtype)
        if not out.flags.c_contiguous or out.dtype != dtype or out.shape != info.shape:
            out[...] = self.read(name)
        else:
            self._fill(info, info.offset, out.reshape(-1).view(np.uint8))

    def chunks(self, name: str, size: int) -> Iterator[memoryview]:
        """The raw bytes of a tensor in order, in pieces of at most ``size`` bytes; works for every dtype."""
        if size <= 0:
            raise ValueError("a chunk must have at least one byte")
        total = self._info(name).nbytes
        for done in range(0, total, size):
            yield self.chunk(name, done, min(size, total - done))

    def chunk(self, name: str, start: int, size: int) -> memoryview:
        """``size`` raw bytes of a tensor, ``start`` bytes after its beginning; works for every dtype."""
        info = self._info(name)
        if not 0 <= start <= start + size <= info.nbytes:
            raise CheckpointError(f"bytes {start} to {start + size} are outside tensor {name} of {info.nbytes} bytes")
        return self._fetch(info, info.offset + start, size).data

    def close(self) -> None:
        """Close the files; reading afterwards is an error."""
        with self._lock:
            self._closed = True
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.inventory.tensors[name]
        except KeyError:
            raise CheckpointError(f"there is no tensor {name} in {self.inventory.source}") from None

    def _fetch(self, info: TensorInfo, offset: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        buffer = np.empty(size, np.uint8)
        self._fill(info, offset, buffer)
        return buffer

    def _fill(self, info: TensorInfo, offset: int, buffer: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        size = buffer.nbytes
        if self._root is None:
            return self._fill_remote(info, offset, buffer)
        try:
            descriptor = self._descriptor(self._root, info.file)
            count = read_into(descriptor, buffer.data, offset)
        except OSError as error:
            raise CheckpointError(f"tensor {info.name} in {info.file} cannot be read ({reason(error)})") from error
        if count < size:
            raise CheckpointError(
                f"tensor {info.name} in {info.file} is truncated: {count} of {size} bytes could be read"
            )
        if size >= _FORGET_BYTES and descriptor in self._uncached:
            forget_pages(descriptor, offset, size)

    def _fill_remote(self, info: TensorInfo, offset: int, buffer: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        if self._closed:
            raise CheckpointError(f"the reader of {self.inventory.source} is closed")
        ranges = self._ahead or self._store
        count = ranges.read_into(info.file, buffer.data, offset)
        if count < buffer.nbytes:
            raise CheckpointError(
                f"tensor {info.name} in {info.file} is truncated: {count} of {buffer.nbytes} bytes could be read"
            )

    def _descriptor(self, root: Path, file: str) -> int:
        with self._lock:
            if self._closed:
                raise CheckpointError(f"the reader of {self.inventory.source} is closed")
            if file not in self._descriptors:
                descriptor, size = open_regular(root / file)
                self._descriptors[file] = descriptor
                if size < self.inventory.files[file]:
                    raise CheckpointError(
                        f"{file} is truncated: it has {size} bytes, it had {self.inventory.files[file]}"
                    )
                if not is_cached(descriptor, size):
                    self._uncached.add(descriptor)
            return self._descriptors[file]
