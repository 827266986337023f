"""What every format offers, and the registry of formats by name."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import FormatError
from halfbyte.formats.codebooks import Codebook
from halfbyte.formats.rotation import ROTATIONS, Rotation, rotated
from halfbyte.formats.scales import ScaleType
from halfbyte.formats.tensor import QuantizedTensor


@dataclass(frozen=True)
class Format(ABC):
    """A way to store a weight [..., N, K] in few bits; instances are declarations in the registry.

    Ask a format, do not examine its class: whatever other rooms need to know of a format is a property or a method
    here, with an answer for kinds of formats that have no such thing.
    """

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

    @abstractmethod
    def value_range(self, tensor: QuantizedTensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """FP32 values at both ends of what each element's block can stand for, in the tensor's shape.

        Either end may be the larger one: a negative scale turns a codebook around.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Block, bits, scale type and codebooks as JSON values, so that a file explains itself to any reader."""

    @property
    def has_global_scale(self) -> bool:
        """Whether one FP32 number per matrix multiplies all block scales."""
        return False

    @property
    def scale_per_matrix(self) -> bool:
        """Whether a matrix has a single block scale."""
        return self.block == (-1, -1)

    @property
    def shares_scale(self) -> bool:
        """Whether one number scales the whole matrix, so that matrices which engines fuse must agree on it."""
        return self.has_global_scale or self.scale_per_matrix

    @property
    def rotation(self) -> Rotation | None:
        """How weights are rotated before they are rounded, None where they are not."""
        return None

    @property
    def plain(self) -> Format:
        """The same format without its rotation."""
        return self

    # the following are no plain properties, so that subclasses may hold them as fields (written ``= field()``)
    @cached_property
    def bits(self) -> int:
        """Bits of an element's code."""
        columns = max(self.block[1], 8)
        dtype, shape = self.parts((max(self.block[0], 1), columns))["codes"]
        return 8 * np.dtype(dtype).itemsize * int(shape[-1]) // columns

    @cached_property
    def scale(self) -> ScaleType | None:
        """How block scales are stored, None where that is no plain scale type."""
        return None

    @cached_property
    def codebooks(self) -> tuple[Codebook, ...]:
        """The codebooks that blocks choose from, () where elements are computed from their codes."""
        return ()

    @cached_property
    def offset(self) -> str | None:
        """What a group stores beside its scale ("bias" or "zero_point"), None for formats without offsets."""
        return None

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored scales for a weight's shape."""
        return self.parts(shape)["scales"][1]

    def split_scales(self, scales: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
        """FP32 values of stored scales and the codebook that each block chose, None where there is no choice."""
        return scales.astype(np.float32), None

    def codebooks_of(self, tensor: QuantizedTensor) -> NDArray[np.uint8]:
        """Index of the codebook that each block chose."""
        return np.zeros(tensor.scales.shape, dtype=np.uint8)

    def zero_scales(self, tensor: QuantizedTensor) -> NDArray[np.bool_]:
        """Which stored scales are zero, so that their blocks decode to zeros; shaped like the scales."""
        return np.zeros(tensor.scales.shape, dtype=np.bool_)

    def scale_factors(self, tensor: QuantizedTensor) -> NDArray[np.float32]:
        """What each scale byte multiplies codebook values by, FP32 [..., codes]; FormatError without scale bytes."""
        raise FormatError(f"{self.name} has no scale bytes, so they cannot be listed; compare decoded values")

    def global_scale_reach(self, largest_scale: float | None = None) -> float:
        """The multiple of the global scale that a tensor's amax maps to; FormatError without a global scale.

        ``largest_scale``: the block scale that amax gets, by default the largest that can be stored.
        """
        raise FormatError(f"{self.name} has no global scale")

    def block_reach(self, tensor: QuantizedTensor) -> NDArray[np.float32]:
        """Largest magnitude that each block along K can stand for, FP32, shaped like the scales."""
        reach = np.abs(self.value_range(tensor)).max(axis=0)
        return np.asarray(reach.reshape(*tensor.scales.shape, self.block[1]).max(axis=-1))

    def is_finite(self, tensor: QuantizedTensor) -> bool:
        """Whether the tensor decodes to neither a NaN nor an infinity."""
        return bool(np.isfinite(tensor.decode()).all())

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
