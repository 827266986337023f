"""HiFloat4: 64 elements in 36 bytes with a three-level scale (arXiv 2602.11287)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import scales
from halfbyte.formats.arrays import Array, Floats
from halfbyte.formats.format import Format, QuantizedTensor
from halfbyte.formats.given_scales import inverse_of, scaled
from halfbyte.formats.losses import loss_of
from halfbyte.formats.packing import pack_nibbles, unpack_nibbles
from halfbyte.formats.registry import register
from halfbyte.formats.scale_search import Encoded, ScaleSearch

_QUARTERS = np.arange(8, dtype=np.float32) / np.float32(4)
MAGNITUDES = np.concatenate([_QUARTERS, -_QUARTERS])
"""S1P2 elements by code: sign in bit 3, magnitude 0 to 1.75 in steps of a quarter."""

_LARGEST = np.float32(7 * scales.E6M2.maximum)


@dataclass(frozen=True)
class HiF4Format(Format):
    """value = S1P2 * 2**(e8 + e16) * E6M2.

    A scale is a 32-bit word: bits 7:0 E6M2, bit 8+i the exponent bit of the i-th 8 elements, bit 16+i that
    of the i-th 4 elements.
    """

    @property
    def block(self) -> tuple[int, int]:
        """The 64 columns of a row that share a scale word."""
        return (1, 64)

    def value_range(self, tensor: QuantizedTensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Minus and plus 1.75 times the scales of each element."""
        step = scales.E6M2.to_value(tensor.scales & np.uint32(255))[..., None]
        top = np.repeat(np.float32(1.75) * (step * micro_scales(tensor.scales)), 4, axis=-1).reshape(tensor.shape)
        return -top, top

    def round_to(self, tensor: QuantizedTensor, x: Array) -> QuantizedTensor:
        """Magnitudes in quarters of each element's three scales, halves rounded up."""
        step = inverse_of(scales.E6M2.to_value(tensor.scales & np.uint32(255)))
        inverse = np.repeat(step.astype(ml_dtypes.bfloat16).astype(np.float32), 64, axis=-1)
        micro = np.repeat(micro_scales(tensor.scales), 4, axis=-1).reshape(tensor.shape)
        z = scaled(x, inverse, inverse_of(micro))
        quarters = np.minimum(np.floor(np.abs(z) * 4 + np.float32(0.5)), 7).astype(np.uint8)
        return replace(tensor, codes=pack_nibbles(quarters | (np.signbit(z).astype(np.uint8) << 3)))

    def cells(self, tensor: QuantizedTensor) -> tuple[Floats, Floats]:
        """An eighth to both sides of each value, none beyond 1.75; both zeros reach to both sides."""
        codes = unpack_nibbles(tensor.codes)
        value, factor = MAGNITUDES[codes], self._factors(tensor)
        top, eighth = np.float32(1.75), np.float32(0.125)
        return np.maximum(value - eighth, -top) * factor, np.minimum(value + eighth, top) * factor

    def _factors(self, tensor: QuantizedTensor) -> Floats:
        """What each element is multiplied by, exact."""
        step = scales.E6M2.to_value(tensor.scales & np.uint32(255))[..., None]
        return np.repeat(step * micro_scales(tensor.scales), 4, axis=-1).reshape(tensor.shape)

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
        """FP32 values of the elements times their three scales, exact."""
        values = MAGNITUDES[unpack_nibbles(tensor.codes)].reshape(*tensor.scales.shape, 16, 4)
        factor = scales.E6M2.to_value(tensor.scales & np.uint32(255))[..., None]
        return np.asarray((values * (factor * micro_scales(tensor.scales))[..., None]).reshape(tensor.shape))

    def encode_reference(
        self, x: Floats, search: ScaleSearch, global_scale: Floats | None, weight: Floats | None
    ) -> Encoded:
        """Blocks of 64 by NumPy: the E6M2 scale may be swept, the micro exponents follow."""
        magnitude = np.minimum(np.abs(x), _LARGEST)
        fours = magnitude.reshape(-1, 16, 4).max(axis=2)
        eights = fours.reshape(-1, 8, 2).max(axis=2)
        seventh = np.float32(ml_dtypes.bfloat16(1 / 7))
        largest = (eights.max(axis=1) * seventh).astype(ml_dtypes.bfloat16).astype(np.float32)
        base = scales.E6M2.to_code(np.where(largest == 0, np.float32(1), largest)).astype(np.int32)
        best = np.full(len(x), np.inf, dtype=np.float32)
        codes, words = np.zeros(x.shape, dtype=np.uint8), np.zeros(len(x), dtype=np.uint32)
        # an E6M2 step is a quarter octave: the window of the sweep is that of E4M3 in value
        for offset in sorted({0, *(o // 2 for o in search.offsets)}, key=lambda o: (o < 0, abs(o))):
            code = np.clip(base + offset, 0, 254).astype(np.uint8)
            step = scales.E6M2.to_value(code)
            inverse = (np.float32(1) / step).astype(ml_dtypes.bfloat16).astype(np.float32)[:, None]
            e8 = eights * inverse >= 4
            e16 = fours * inverse * np.exp2(-np.repeat(e8, 2, axis=1).astype(np.float32)) >= 2
            bits = np.concatenate([e8, e16], axis=1).astype(np.uint32)
            word = code | (bits << np.arange(8, 32, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
            micro = np.repeat(micro_scales(word), 4, axis=1)
            # magnitudes in quarters, halves rounded up
            quarters = np.minimum(np.floor(magnitude * inverse / micro * 4 + np.float32(0.5)), 7).astype(np.uint8)
            value = quarters.astype(np.float32) * np.float32(0.25) * micro
            loss = loss_of(value - magnitude / step[:, None], weight, "sse") * (step * step)
            better = loss < best
            best[better], words[better] = loss[better], word[better]
            codes[better] = (quarters | (np.signbit(x).astype(np.uint8) << 3))[better]
        zero = ~np.any(x, axis=1)
        codes[zero], words[zero] = 0, 0
        return Encoded(codes, words)


def micro_scales(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """2**(e8 + e16) of each group of 4 elements, shape [..., 16]."""
    e8 = (words[..., None] >> np.arange(8, 16, dtype=np.uint32)) & np.uint32(1)
    e16 = (words[..., None] >> np.arange(16, 32, dtype=np.uint32)) & np.uint32(1)
    return np.exp2((np.repeat(e8, 2, axis=-1) + e16).astype(np.float32))


HIF4 = register(HiF4Format("hif4"))
