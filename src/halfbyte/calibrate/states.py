"""Hidden states between two layers, in a file, and memory that is given back."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import OutputError


class States:
    """Hidden states of all tokens, FP32 [tokens, width], in a file that stays: not mapped, so no part of memory."""

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width = path, width
        path.touch()

    def read(self, rows: slice) -> NDArray[np.float32]:
        """Some rows; OutputError where the file does not have them."""
        states = np.fromfile(self.path, np.float32, (rows.stop - rows.start) * self.width, offset=self._offset(rows))
        if states.size < (rows.stop - rows.start) * self.width:
            raise OutputError(f"{self.path} lost hidden states; remove its folder and calibrate again")
        return states.reshape(-1, self.width)

    def write(self, rows: slice, states: NDArray[np.float32]) -> None:
        """Some rows, given with any leading dimensions."""
        with self.path.open("r+b") as file:
            file.seek(self._offset(rows))
            file.write(np.ascontiguousarray(states, np.float32).data.cast("B"))

    def take(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows, in order or by their numbers."""
        if isinstance(rows, slice):
            return self.read(rows)
        return np.array(self._mapped("r")[rows])

    def add(self, rows: slice | NDArray[np.int64], change: NDArray[np.float32]) -> None:
        """Add to rows; no number comes twice."""
        mapped = self._mapped("r+")
        mapped[rows] += change

    def _mapped(self, mode: Literal["r", "r+"]) -> NDArray[np.float32]:
        return np.memmap(self.path, np.float32, mode).reshape(-1, self.width)

    def sync(self) -> None:
        """Onto the disk, so that a layer which counts as done has its states even after a power failure."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())

    def _offset(self, rows: slice) -> int:
        return int(rows.start) * self.width * 4


def release_memory() -> None:
    """Freed memory back to the system; only glibc can be told so."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
