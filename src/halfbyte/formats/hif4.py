"""HiFloat4: 64 elements in 36 bytes with a three-level scale (arXiv 2602.11287)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import scales
from halfbyte.formats.format import Format, register
from halfbyte.formats.packing import unpack_nibbles
from halfbyte.formats.tensor import QuantizedTensor

_QUARTERS = np.arange(8, dtype=np.float32) / np.float32(4)
MAGNITUDES = np.concatenate([_QUARTERS, -_QUARTERS])
"""S1P2 elements by code: sign in bit 3, magnitude 0 to 1.75 in steps of a quarter."""


@dataclass(frozen=True)
class HiF4Format(Format):
    """value = S1P2 * 2**(e8 + e16) * E6M2.

    A scale is a 32-bit word: bits 7:0 E6M2, bit 8+i the exponent bit of the i-th 8 elements, bit 16+i that
    of the i-th 4 elements.
    """

    @property
    def block(self) -> tuple[int, int]:
        """One row, 64 columns."""
        return (1, 64)

    def value_range(self, tensor: QuantizedTensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Minus and plus 1.75 times the scales of each element."""
        step = scales.E6M2.to_value(tensor.scales & np.uint32(255))[..., None]
        top = np.repeat(np.float32(1.75) * (step * micro_scales(tensor.scales)), 4, axis=-1).reshape(tensor.shape)
        return -top, top

    def describe(self) -> dict[str, Any]:
        """Block, bits, name of the scale word and the elements by code."""
        return {"block": [1, 64], "bits": 4, "scale": "hif4", "table_values": [MAGNITUDES.tolist()]}

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Nibbles [..., K/2] and scale words [..., K/64]."""
        return {
            "codes": (np.uint8, (*shape[:-1], shape[-1] // 2)),
            "scales": (np.uint32, (*shape[:-1], shape[-1] // 64)),
        }

    def decode(self, tensor: QuantizedTensor) -> NDArray[np.float32]:
        """FP32, exact."""
        values = MAGNITUDES[unpack_nibbles(tensor.codes)].reshape(*tensor.scales.shape, 16, 4)
        factor = scales.E6M2.to_value(tensor.scales & np.uint32(255))[..., None]
        return np.asarray((values * (factor * micro_scales(tensor.scales))[..., None]).reshape(tensor.shape))


def micro_scales(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """2**(e8 + e16) of each group of 4 elements, shape [..., 16]."""
    e8 = (words[..., None] >> np.arange(8, 16, dtype=np.uint32)) & np.uint32(1)
    e16 = (words[..., None] >> np.arange(16, 32, dtype=np.uint32)) & np.uint32(1)
    return np.exp2((np.repeat(e8, 2, axis=-1) + e16).astype(np.float32))


HIF4 = register(HiF4Format("hif4"))
