"""What every format answers, and the tensors that are stored in one."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import FormatError
from halfbyte.formats.arrays import Array, Codes, Floats
from halfbyte.formats.codebooks import Codebook
from halfbyte.formats.rotation import Rotation
from halfbyte.formats.scale_search import ColumnChoice, Encoded, ScaleSearch
from halfbyte.formats.scales import ScaleType


@cache
def compiled() -> Any:
    """The kernels, which stand above this room: loaded when first needed, whatever was imported before."""
    return importlib.import_module("halfbyte.kernels")


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
    def encode_reference(
        self, x: Floats, search: ScaleSearch, global_scale: Floats | None, weight: Floats | None
    ) -> Encoded:
        """Blocks x FP32 [n, B] by NumPy: the definition that compiled code equals bit for bit.

        ``global_scale`` FP32 [n] where the format has one; ``weight`` FP32 [n, B] weights squared errors.
        """

    @abstractmethod
    def value_range(self, tensor: QuantizedTensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """FP32 values at both ends of what each element's block can stand for, in the tensor's shape.

        Either end may be the larger one: a negative scale turns a codebook around.
        """

    @abstractmethod
    def round_to(self, tensor: QuantizedTensor, x: Array) -> QuantizedTensor:
        """The scales of a tensor with the codes that are nearest to x, FP32 of its shape and as its blocks see it.

        Values beyond the ends are saturated. ``tensor`` stays as it is; a format in rotated space takes x rotated.
        """

    @abstractmethod
    def cells(self, tensor: QuantizedTensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Lowest and highest value for which ``round_to`` gives each element the code that it has.

        The middles to the neighbours, so to be approached and not met; at the ends of a codebook the value itself.
        """

    @property
    def rounds_columns(self) -> bool:
        """Whether GPTQ can round single columns of a block: the four methods that follow are there."""
        return False

    def column_choices(self, y: Floats, search: ScaleSearch) -> Iterator[tuple[ColumnChoice, bool]]:
        """Candidates for blocks y [B, rows], the first one first, and whether errors must judge them."""
        raise self._without_columns()

    def column_unit(self, y: Floats, first: ColumnChoice) -> Floats:
        """Power of two [rows] that keeps the squares of a block's errors in range."""
        raise self._without_columns()

    def round_column(self, y: Floats, choice: ColumnChoice) -> tuple[Codes, Floats]:
        """Codes and values of one column y [rows]."""
        raise self._without_columns()

    def stored_choice(self, stored: Array, offset: Array | None) -> ColumnChoice:
        """The choice that stored scales [rows] and offsets stand for."""
        raise self._without_columns()

    def _without_columns(self) -> FormatError:
        return FormatError(f"{self.name} has no rounding of single columns, which GPTQ needs; choose another format")

    def settled_choice(self, choice: ColumnChoice, y: Floats) -> ColumnChoice:
        """The best candidate for blocks y [B, rows] as it is stored: with selector bits, and blocks of zeros."""
        return choice

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
    def plain(self) -> Format:
        """The same format without its rotation."""
        return self

    def rotate(self, weight: Array, steps: Any = None) -> tuple[Array, Codes | None]:
        """A weight [..., N, K] as its blocks see it, and the rotation's steps as they are stored.

        The very weight here; rotated in FP32 by formats in rotated space. FormatError for steps that do not fit.
        """
        if steps is not None:
            raise FormatError(f"{self.name} is in no rotated space; leave the argument rotation out")
        return weight, None

    def unrotate(self, values: Array, steps: Any = None) -> Array:
        """Take the rotation out of matrices [..., N, K] in FP32 or FP64, in place; there is none to take out here.

        ``steps`` [K/B, steps] are those of one matrix, as ``rotate`` gives them, and hold for all.
        """
        return values

    def from_plain(self, tensor: QuantizedTensor, steps: Any = None) -> QuantizedTensor:
        """A tensor of the plain format, made of a rotated weight, as one of this format."""
        return tensor

    def to_plain(self, tensor: QuantizedTensor) -> QuantizedTensor:
        """The same codes and scales in the plain format, which stand for the rotated weight."""
        return tensor

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
    def rotation(self) -> Rotation | None:
        """How weights are rotated before they are rounded, None where they are not."""
        return None

    @cached_property
    def offset(self) -> str | None:
        """What a group stores beside its scale ("bias" or "zero_point"), None for formats without offsets."""
        return None

    def in_block_space(self, tensor: QuantizedTensor, source: Array) -> tuple[QuantizedTensor, Array]:
        """A tensor and its source as the blocks see them: the very two, except in rotated space."""
        return tensor, source

    def values(self, tensor: QuantizedTensor, dtype: Any = np.float32) -> Array:
        """What ``decode`` gives, rounded to ``dtype``; by compiled code where there is some for this format."""
        out = np.empty(tensor.shape, dtype=dtype)
        if compiled().decode_into(tensor, out):
            return out
        return np.asarray(self.decode(tensor).astype(dtype, copy=False))

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


@dataclass
class QuantizedTensor:
    """Arrays of one quantized weight (or of a stack of experts: leading dimensions).

    For a weight of shape [..., N, K]: ``codes`` uint8 [..., N, K*bits/8], first element in the lowest bits;
    ``scales`` [..., N, K/B] in the format's own type (bytes for E4M3, E8M0 and the like, any selector bits included);
    ``global_scale`` FP32 [...] multiplies every scale, or None; ``offsets``: biases or
    zero points of affine formats, shaped like ``scales``. ``global_scale_inv`` FP32 [...]: where a checkpoint stores
    the reciprocal of the global scale, that stored number is the exact one and decoding divides by it. ``rotation``
    uint8 [..., K/B, steps]: channels that make up the rotation of each block (``halfbyte.formats.rotation``), or None.
    """

    format: Format
    shape: tuple[int, ...]
    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    global_scale: NDArray[np.float32] | None = None
    offsets: NDArray[Any] | None = None
    global_scale_inv: NDArray[np.float32] | None = None
    rotation: NDArray[np.uint8] | None = None

    def decode(self, dtype: Any = np.float32) -> NDArray[Any]:
        """The values that the codes stand for, in the weight's shape: FP32, or rounded to another type."""
        return self.format.values(self, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        arrays = (self.codes, self.scales, self.global_scale, self.offsets, self.rotation)
        return sum(a.nbytes for a in arrays if a is not None)

    @property
    def codebooks(self) -> NDArray[np.uint8]:
        """Index of the codebook that each block chose, shaped like ``scales``."""
        return self.format.codebooks_of(self)


def stacked(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One tensor of the experts of several, in order."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    names = ("codes", "scales", "global_scale", "offsets", "global_scale_inv", "rotation")
    parts: dict[str, Any] = {
        name: np.concatenate([getattr(t, name) for t in tensors]) for name in names if getattr(first, name) is not None
    }
    return replace(first, shape=(sum(t.shape[0] for t in tensors), *first.shape[1:]), **parts)


def check_finite(array: Array) -> None:
    """FormatError that names the first NaN or infinity of a weight, if there is one."""
    finite = np.isfinite(array.astype(np.float32))
    if not finite.all():
        where = [int(i) for i in np.argwhere(~finite)[0]]
        raise FormatError(f"the weight holds a NaN or infinity, first at index {where}; repair the source")
