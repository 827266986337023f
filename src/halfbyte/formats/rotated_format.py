"""Formats in rotated space: a format with blocks along K, and a rotation of the channels of each block.

This is the one place that knows what a rotation does to a tensor. Others call ``rotate``, ``from_plain``, ``to_plain``
and ``in_block_space``, which every format has, and work in the plain format between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from halfbyte.errors import FormatError
from halfbyte.formats.arrays import Array, Codes, Floats
from halfbyte.formats.codebooks import Codebook
from halfbyte.formats.format import Format, QuantizedTensor, check_finite, compiled
from halfbyte.formats.rotation import ROTATIONS, SIZES, Rotation, Swaps, check_swaps, rotate_reference
from halfbyte.formats.scale_search import Encoded, ScaleSearch
from halfbyte.formats.scales import ScaleType


@dataclass(frozen=True)
class RotatedFormat(Format):
    """Codes and scales of ``base``, which stand for the weight times a rotation of each block's columns."""

    base: Format
    rotation: Rotation = field()

    @property
    def plain(self) -> Format:
        """The format without the rotation."""
        return self.base

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        return self.base.block

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Bits of an element's code."""
        return self.base.bits

    @property
    def has_global_scale(self) -> bool:
        """Whether one FP32 number per matrix multiplies all block scales."""
        return self.base.has_global_scale

    @property
    def scale(self) -> ScaleType | None:  # type: ignore[override]
        """How block scales are stored."""
        return self.base.scale

    @property
    def codebooks(self) -> tuple[Codebook, ...]:  # type: ignore[override]
        """The codebooks that blocks choose from."""
        return self.base.codebooks

    @property
    def offset(self) -> str | None:  # type: ignore[override]
        """What a group stores beside its scale."""
        return self.base.offset

    @property
    def rounds_columns(self) -> bool:
        """Whether GPTQ can round the rotated weight in the plain format."""
        return self.base.rounds_columns

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """The arrays of the plain format, and the steps of the rotation where it has any."""
        parts = self.base.parts(shape)
        if self.rotation.steps:
            parts["rotation"] = (np.uint8, self.rotation.swaps_shape(shape[:-2], shape[-1], self.block[1]))
        return parts

    def describe(self) -> dict[str, Any]:
        """The plain format's description and the rotation's name, size and largest number of steps."""
        facts = self.base.describe()
        selector = {"selector": facts.pop("selector")} if "selector" in facts else {}
        rotation = {"name": self.rotation.name, "size": self.block[1], "steps": self.rotation.steps}
        return facts | {"rotation": rotation} | selector

    def decode(self, tensor: QuantizedTensor) -> Floats:
        """FP32 values of the plain format, rotated back; all by NumPy."""
        values = self.base.decode(self.to_plain(tensor))
        matrices, steps = self._blocks(values, tensor.rotation)
        rotate_reference(matrices, self.block[1], steps, inverse=True)
        return values

    def values(self, tensor: QuantizedTensor, dtype: Any = np.float32) -> Array:
        """What ``decode`` gives, rounded to ``dtype``; by compiled code where there is some."""
        values = self.to_plain(tensor).decode()
        self.rotate_in_place(values, tensor.rotation, inverse=True)
        return values.astype(dtype, copy=False)

    def rotate(self, weight: Array, steps: Any = None) -> tuple[Floats, Swaps | None]:
        """x R in FP32 for a weight x [..., N, K], and the steps of R as they are stored (the Hadamard matrix: None)."""
        checked = check_swaps(steps, self.rotation, weight.shape, self.block[1])
        rotated_weight = weight.astype(np.float32)
        self.rotate_in_place(rotated_weight, checked)
        if not np.isfinite(rotated_weight).all():
            check_finite(weight)
            raise FormatError("the weight leaves the range of FP32 where it is rotated; its values are too large")
        return rotated_weight, checked

    def rotate_in_place(self, x: Floats, steps: Any = None, inverse: bool = False) -> None:
        """x R for contiguous x FP32 [..., N, K]; ``inverse``: x R^T. FormatError for steps that do not fit."""
        matrices, checked = self._blocks(x, steps)
        if not compiled().rotate_into(matrices, self.block[1], checked, inverse):
            rotate_reference(matrices, self.block[1], checked, inverse)

    def unrotate(self, values: Array, steps: Any = None) -> Array:
        """x R^T for contiguous x [..., N, K] in FP32 or FP64, in place, with the steps [K/B, steps] of one matrix."""
        matrices = values.reshape(-1, *values.shape[-2:])
        swaps = None if steps is None else np.broadcast_to(steps, (len(matrices), *np.shape(steps)))
        rotate_reference(matrices, self.block[1], swaps, inverse=True)
        return values

    def from_plain(self, tensor: QuantizedTensor, steps: Any = None) -> QuantizedTensor:
        """A tensor of the plain format, made of a weight rotated by these steps, as one of this format."""
        return replace(tensor, format=self, rotation=check_swaps(steps, self.rotation, tensor.shape, self.block[1]))

    def to_plain(self, tensor: QuantizedTensor) -> QuantizedTensor:
        """The same codes and scales in the plain format, which stand for the rotated weight."""
        return replace(tensor, format=self.base, rotation=None)

    def in_block_space(self, tensor: QuantizedTensor, source: Array) -> tuple[QuantizedTensor, Array]:
        """The tensor in the plain format beside its source, rotated: the same error, block by block."""
        rotated_source = source.astype(np.float32)
        self.rotate_in_place(rotated_source, tensor.rotation)
        return self.to_plain(tensor), rotated_source

    def encode_reference(
        self, x: Floats, search: ScaleSearch, global_scale: Floats | None, weight: Floats | None
    ) -> Encoded:
        """Blocks of the rotated weight, as the plain format encodes them."""
        return self.base.encode_reference(x, search, global_scale, weight)

    def value_range(self, tensor: QuantizedTensor) -> tuple[Floats, Floats]:
        """Both ends of what each element of the rotated weight can be."""
        return self.base.value_range(self.to_plain(tensor))

    def round_to(self, tensor: QuantizedTensor, x: Array) -> QuantizedTensor:
        """The nearest codes of a rotated weight x, with the tensor's scales and rotation."""
        return replace(tensor, codes=self.base.round_to(self.to_plain(tensor), x).codes)

    def cells(self, tensor: QuantizedTensor) -> tuple[Floats, Floats]:
        """Both ends of the values of the rotated weight that keep their codes."""
        return self.base.cells(self.to_plain(tensor))

    def block_reach(self, tensor: QuantizedTensor) -> Floats:
        """Largest magnitude that each block of the rotated weight can hold."""
        return self.base.block_reach(self.to_plain(tensor))

    def is_finite(self, tensor: QuantizedTensor) -> bool:
        """Whether the plain format's values are finite."""
        return self.base.is_finite(self.to_plain(tensor))

    def split_scales(self, scales: Array) -> tuple[Floats, Codes | None]:
        """FP32 values of stored scales and the codebook that each block chose."""
        return self.base.split_scales(scales)

    def codebooks_of(self, tensor: QuantizedTensor) -> Codes:
        """Index of the codebook that each block chose."""
        return self.base.codebooks_of(tensor)

    def zero_scales(self, tensor: QuantizedTensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which stored scales are zero."""
        return self.base.zero_scales(tensor)

    def scale_factors(self, tensor: QuantizedTensor) -> Floats:
        """What each scale byte multiplies codebook values by."""
        return self.base.scale_factors(tensor)

    def global_scale_reach(self, largest_scale: float | None = None) -> float:
        """The multiple of the global scale that a tensor's amax maps to."""
        return self.base.global_scale_reach(largest_scale)

    def _blocks(self, x: Array, steps: Any) -> tuple[Array, Swaps | None]:
        """A weight as matrices [L, N, K], and steps [L, K/B, steps] that fit it."""
        checked = check_swaps(steps, self.rotation, x.shape, self.block[1])
        matrices = x.reshape((-1, *x.shape[-2:]) if x.ndim > 1 else (1, 1, -1))
        return matrices, None if checked is None else checked.reshape(-1, *checked.shape[-2:])


def rotated(fmt: Format, name: str) -> RotatedFormat:
    """A format in rotated space; its name ends with the rotation's. FormatError where blocks are not along K."""
    if fmt.rotation:
        raise FormatError(f"{fmt.name} is that of rotated weights already; name the format without its rotation")
    if not fmt.codebooks or fmt.block[0] != 1 or fmt.block[1] not in SIZES:
        raise FormatError(
            f"{fmt.name} cannot be rotated: that needs one scale for each 16, 32, 64 or 128 columns of a row"
        )
    return RotatedFormat(f"{fmt.name}_{name}", fmt, ROTATIONS[name])
