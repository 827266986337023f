"""Two 4-bit codes in a byte: the even element in the low nibble, as every safetensors dialect has it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack codes 0..15 of shape [..., K] (K even) into bytes [..., K/2]."""
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4))


def unpack_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Unpack bytes [..., K/2] into codes [..., K]."""
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    codes[..., 0::2] = packed & 15
    codes[..., 1::2] = packed >> 4
    return codes
