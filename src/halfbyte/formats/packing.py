"""Codes in bytes, first element in the lowest bits: the even one in the low nibble, as safetensors dialects have it."""

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


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes of ``bits`` bits and shape [..., K] (K a multiple of 8) into an unbroken stream [..., K*bits/8]."""
    if bits == 8:
        return codes
    if bits == 4:
        return pack_nibbles(codes)
    single = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(single.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack_codes(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Unpack a stream [..., K*bits/8] into codes [..., K]."""
    if bits == 8:
        return packed
    if bits == 4:
        return unpack_nibbles(packed)
    single = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, bits)
    return np.packbits(single, axis=-1, bitorder="little")[..., 0]
