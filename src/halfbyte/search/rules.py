"""The scale that absmax scaling gives a block, per scale type."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import BlockFormat, Codebook
from halfbyte.formats.arrays import Floats


def base_codes(amax: Floats, codebook: Codebook, fmt: BlockFormat, rule: str) -> NDArray[Any]:
    """Scale codes of absmax scaling for the (normalised) largest magnitudes of blocks."""
    if fmt.scale.name == "e8m0":
        return _power_of_two(amax, codebook, rule)
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
