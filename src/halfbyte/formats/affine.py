"""Affine formats: unsigned codes with a scale and an offset per group along K."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from halfbyte.formats.format import Format, register
from halfbyte.formats.packing import unpack_codes
from halfbyte.formats.tensor import QuantizedTensor


@dataclass(frozen=True)
class AffineFormat(Format):
    """value = code * scale + bias (MLX), or (code - zero_point) * scale (asymmetric INT4).

    Scales and biases are BF16 [..., N, K/group]; zero points are uint8 of that shape.
    """

    bits: int = field()
    group: int
    offset: Literal["bias", "zero_point"] = field()

    @property
    def block(self) -> tuple[int, int]:
        """One row, ``group`` columns."""
        return (1, self.group)

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Dtype and shape of codes, scales and offsets."""
        groups = (*shape[:-1], shape[-1] // self.group)
        width = shape[-1] * self.bits // 8
        offset_type = ml_dtypes.bfloat16 if self.offset == "bias" else np.uint8
        return {
            "codes": (np.uint8, (*shape[:-1], width)),
            "scales": (ml_dtypes.bfloat16, groups),
            "offsets": (offset_type, groups),
        }

    def value_range(self, tensor: QuantizedTensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Values of code 0 and of the largest code."""
        assert tensor.offsets is not None
        scales, offsets = tensor.scales.astype(np.float32), tensor.offsets.astype(np.float32)
        levels = np.float32(self.levels)
        if self.offset == "bias":
            first, last = offsets, levels * scales + offsets
        else:
            first, last = (-offsets) * scales, (levels - offsets) * scales
        return np.repeat(first, self.group, axis=-1), np.repeat(last, self.group, axis=-1)

    def describe(self) -> dict[str, Any]:
        """Block, bits, scale type and kind of offset."""
        return {"block": list(self.block), "bits": self.bits, "scale": "bf16", "offset": self.offset}

    def decode(self, tensor: QuantizedTensor) -> NDArray[np.float32]:
        """FP32: the product is rounded, then the sum."""
        assert tensor.offsets is not None
        grouped = unpack_codes(tensor.codes, self.bits).reshape(*tensor.scales.shape, self.group).astype(np.float32)
        scales = tensor.scales.astype(np.float32)[..., None]
        offsets = tensor.offsets.astype(np.float32)[..., None]
        values = grouped * scales + offsets if self.offset == "bias" else (grouped - offsets) * scales
        return np.asarray(values.reshape(tensor.shape), dtype=np.float32)


for _bits in (2, 3, 4, 5, 6, 8):
    for _group in (32, 64, 128):
        register(
            AffineFormat(f"affine{_bits}_g{_group}", _bits, _group, "bias"),
            *((f"affine{_bits}",) + (("affine",) if _bits == 4 else ()) if _group == 64 else ()),
        )
for _group in (16, 32, 64, 128):
    register(
        AffineFormat(f"int4_asym_g{_group}", 4, _group, "zero_point"),
        *(("int4_asym",) if _group == 128 else ()),
    )
