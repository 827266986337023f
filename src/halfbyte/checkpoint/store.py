"""Where the files of a checkpoint lie: a folder of this machine, or any place that reads ranges of files by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from halfbyte.checkpoint.files import check_link, open_regular, read_into, read_small, reason
from halfbyte.checkpoint.header import TensorInfo, read_header
from halfbyte.checkpoint.identity import FileIdentity, identify, sample
from halfbyte.checkpoint.listing import list_folder
from halfbyte.checkpoint.stream_hash import hash_path
from halfbyte.checkpoint.writer import copy_file_atomic
from halfbyte.errors import CheckpointError

Headers = tuple[list[TensorInfo], dict[str, str], int]
"""Tensors by offset, metadata, and the size of the file."""


class Store(Protocol):
    """The files of one checkpoint by their names relative to it. Threads may share a store.

    All methods raise CheckpointError for a file that is not there or cannot be read, and name it.
    """

    @property
    def place(self) -> str:
        """The store as messages name it."""

    @property
    def root(self) -> Path | None:
        """The folder on this machine; None for a store elsewhere."""

    def list(self) -> dict[str, int | None]:
        """Visible files of the store and its direct sub-folders -> bytes; None for what is never copied."""

    def exists(self, name: str) -> bool:
        """Whether there is something of this name."""

    def is_file(self, name: str) -> bool:
        """Whether there is a file of this name that can be read."""

    def check(self, name: str) -> None:
        """Refuse a file that leads out of the store, as links can."""

    def refuse_dead_links(self) -> None:
        """Refuse weight files that are links to nothing."""

    def read_small(self, name: str) -> bytes:
        """Read a whole small file."""

    def read_into(self, name: str, view: memoryview, offset: int) -> int:
        """Fill ``view`` from ``offset``; returns the bytes read, fewer only at the end of the file."""

    def announce(self, names: Sequence[str]) -> None:
        """Say whose headers are read next, so that they can be fetched side by side."""

    def header(self, name: str) -> Headers:
        """Read the header of a safetensors file."""

    def identify(self, name: str) -> FileIdentity:
        """Tell who a file is now."""

    def samples(self, names: Sequence[str]) -> dict[str, str]:
        """SHA-256 (hex) of small files, or of places spread over large ones (``identity.sample``), by name."""

    def sha256(self, name: str) -> str:
        """SHA-256 (hex) of a whole file."""

    def copy(self, name: str, target: Path) -> str:
        """Copy a file to this machine, completely or not at all; returns its SHA-256 (hex)."""

    def folder(self) -> Path:
        """A folder of this machine with config.json and all side files; for libraries that open paths."""


class LocalStore:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root: Path | None = root
        self._root = root

    @property
    def place(self) -> str:
        """The folder as it was given."""
        return str(self._root)

    def list(self) -> dict[str, int | None]:
        """List the folder and its direct sub-folders; CheckpointError for links that lead out of it."""
        return list_folder(self._root)

    def exists(self, name: str) -> bool:
        """Whether there is a file, or a link that leads nowhere."""
        path = self._root / name
        return path.exists() or path.is_symlink()

    def is_file(self, name: str) -> bool:
        """Whether there is a regular file of this name."""
        return (self._root / name).is_file()

    def check(self, name: str) -> None:
        """Refuse a link that leads out of the folder, or nowhere."""
        path = self._root / name
        if (path.is_symlink() or "/" in name) and (path.exists() or path.is_symlink()):
            check_link(self._root, path)

    def refuse_dead_links(self) -> None:
        """Refuse weight files that are links to nothing, or out of the folder."""
        for path in sorted(self._root.iterdir()):
            if path.name.endswith(".safetensors") and path.is_symlink():
                check_link(self._root, path)

    def read_small(self, name: str) -> bytes:
        """Read a whole small file."""
        return read_small(self._root / name)

    def read_into(self, name: str, view: memoryview, offset: int) -> int:
        """Fill ``view`` from ``offset``."""
        path = self._root / name
        descriptor, _ = open_regular(path)
        try:
            return read_into(descriptor, view, offset)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({reason(error)})") from error
        finally:
            os.close(descriptor)

    def announce(self, names: Sequence[str]) -> None:
        """Do nothing: files of this machine need no preparation."""

    def header(self, name: str) -> Headers:
        """Read the header of a safetensors file."""
        return read_header(self._root / name, name)

    def identify(self, name: str) -> FileIdentity:
        """Tell who a file is now."""
        return identify(self._root / name)

    def samples(self, names: Sequence[str]) -> dict[str, str]:
        """Hash small files, or places spread over large ones."""
        return {name: sample(self._root / name) for name in names}

    def sha256(self, name: str) -> str:
        """Hash a whole file."""
        try:
            return hash_path(self._root / name)
        except OSError as error:
            raise CheckpointError(f"{self._root / name} cannot be read ({reason(error)})") from error

    def copy(self, name: str, target: Path) -> str:
        """Copy a file, completely or not at all."""
        return copy_file_atomic(self._root / name, target)

    def folder(self) -> Path:
        """The folder itself."""
        return self._root
