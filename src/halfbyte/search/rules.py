"""The scale that absmax scaling gives a block, per scale type."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import BlockFormat, Codebook, Format
from halfbyte.search.searches import Search

Floats = NDArray[np.float32]
SMALLEST = np.float32(2.0**-126)


def tensor_maximum(fmt: Format, search: Search) -> np.float32:
    """The multiple of the global scale that the tensor's amax maps to: 2688 = 6 * 448 for NVFP4.

    Four Over Six leaves room for scales 1.5 times larger: 6 * 256 = 1536 (arXiv 2512.02010).
    """
    return np.float32(fmt.global_scale_reach(256.0 if search.only == "four_over_six" else None))


def global_scale(
    amax: NDArray[np.float32], fmt: Format, search: Search, power_of_two: bool = False
) -> NDArray[np.float32]:
    """FP32 global scale for the given amax (any shape); 1 where amax is zero.

    ``power_of_two`` rounds it up to a power of two, so that code * scale * global scale is exact in BF16.
    """
    amax = np.asarray(amax, dtype=np.float32)
    scale = np.maximum(amax / tensor_maximum(fmt, search), SMALLEST)
    if power_of_two:
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent)).astype(np.float32)
    return np.where(amax == 0, np.float32(1), scale).astype(np.float32)


def base_codes(amax: Floats, codebook: Codebook, fmt: BlockFormat, search: Search) -> NDArray[Any]:
    """Scale codes of absmax scaling for the (normalised) largest magnitudes of blocks."""
    if fmt.scale.name == "e8m0":
        return _power_of_two(amax, codebook, search.rule)
    return fmt.scale.to_code(amax / np.float32(codebook.top))


def _power_of_two(amax: Floats, codebook: Codebook, rule: str) -> NDArray[np.uint8]:
    """E8M0 codes: floor (OCP), even (+1 where rounding would overflow the grid), rceil (never saturates)."""
    mantissa, exponent = np.frexp(amax)
    mantissa, exponent = mantissa * 2, exponent - 1
    code = exponent.astype(np.int64) - codebook.exponent + 127
    if rule == "even":
        code += mantissa >= np.float32(2 - 2.0 ** -(codebook.mantissa_bits + 1))
    elif rule == "rceil":
        code += mantissa > np.float32(codebook.top / 2.0**codebook.exponent)
    return np.clip(code, 0, 254).astype(np.uint8)
