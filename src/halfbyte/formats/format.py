"""What every format offers, and the registry of formats by name."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import FormatError
from halfbyte.formats.rotation import ROTATIONS, rotated
from halfbyte.formats.tensor import QuantizedTensor


@dataclass(frozen=True)
class Format(ABC):
    """A way to store a weight [..., N, K] in few bits; instances are declarations in the registry."""

    name: str

    @property
    @abstractmethod
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale; -1 stands for all of them."""

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """NumPy dtype and shape of each stored array (``codes``, ``scales``, ...) for a weight's shape."""

    @abstractmethod
    def decode(self, tensor: QuantizedTensor) -> NDArray[np.float32]:
        """FP32 values of a quantized tensor, in its shape."""

    def codebooks_of(self, tensor: QuantizedTensor) -> NDArray[np.uint8]:
        """Index of the table that each block chose."""
        return np.zeros(tensor.scales.shape, dtype=np.uint8)

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why this format cannot hold a weight of this shape, or None if it can."""
        columns = self.block[1]
        if not shape or 0 in shape:
            return f"a weight of shape {list(shape)} is empty"
        if columns > 0 and shape[-1] % columns:
            return f"K = {shape[-1]} is not a multiple of the block size {columns} of {self.name}"
        if self.block[0] != 1 and len(shape) < 2:
            return f"{self.name} needs a matrix, not the shape {list(shape)}"
        return None

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise FormatError if this format cannot hold a weight of this shape."""
        problem = self.problem(shape)
        if problem:
            raise FormatError(f"{problem}; choose another format or keep this tensor")

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of all arrays for a weight's shape."""
        return sum(np.dtype(d).itemsize * math.prod(s) for d, s in self.parts(shape).values())


_FORMATS: dict[str, Format] = {}
_ALIASES: dict[str, str] = {}


def register(fmt: Format, *aliases: str) -> Format:
    """Add a format to the registry under its name and aliases."""
    _FORMATS[fmt.name] = fmt
    _ALIASES.update(dict.fromkeys(aliases, fmt.name))
    return fmt


def get_format(name: str | Format) -> Format:
    """The format of this name or alias; FormatError names the nearest ones otherwise."""
    if isinstance(name, Format):
        return name
    found = _FORMATS.get(_ALIASES.get(name, name)) or _rotated(name)
    if found is None:
        near = difflib.get_close_matches(name, [*_FORMATS, *_ALIASES], n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"known formats: {', '.join(_FORMATS)}"
        raise FormatError(f"unknown format {name!r}: {hint}")
    return found


def _rotated(name: str) -> Format | None:
    """A format in rotated space, by the names of both."""
    base, _, rotation = name.rpartition("_")
    known = _FORMATS.get(_ALIASES.get(base, base))
    return rotated(known, rotation) if known and rotation in ROTATIONS else None


def list_formats() -> list[str]:
    """Names of all registered formats."""
    return list(_FORMATS)
