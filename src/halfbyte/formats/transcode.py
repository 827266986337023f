"""From one format to another without changing a single value, where that is possible."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.formats.format import Format, QuantizedTensor

_LOWEST, _HIGHEST = -9, 8  # E4M3 holds the powers of two from 2**-9 to 2**8
_SMALLEST_TENSOR_SCALE = -126


def may_transcode(source: Format, target: Format) -> bool:
    """Whether some tensors of ``source`` can be written in ``target`` with identical values."""
    return source == target or (source.name, target.name) == ("mxfp4", "nvfp4")


def top_exponent(tensor: QuantizedTensor) -> NDArray[np.int32]:
    """The largest exponent among MXFP4 blocks that hold anything, per leading index, shape [...]."""
    used = np.where(_zero_blocks(tensor), -127, tensor.scales.astype(np.int32) - 127)
    return np.asarray(used.max(axis=(-2, -1)), dtype=np.int32)


def transcode(tensor: QuantizedTensor, target: Format, top: NDArray[np.int32] | None = None) -> QuantizedTensor | None:
    """The same values in ``target``, or None where they do not fit.

    MXFP4 becomes NVFP4 when its blocks' exponents span at most 17: codes stay, each scale is repeated for the two
    halves of its block, and the global scale is a power of two. ``top`` int32 [...] is ``top_exponent`` of the
    tensor, or the largest of a group of tensors that share a global scale.
    """
    if tensor.format == target:
        return tensor
    if not may_transcode(tensor.format, target):
        return None
    assert target.scale is not None
    lead = (..., None, None)
    high = top_exponent(tensor) if top is None else top
    base = np.maximum(high - _HIGHEST, _SMALLEST_TENSOR_SCALE)
    exponent = tensor.scales.astype(np.int32) - 127 - base[lead]
    empty = _zero_blocks(tensor)
    if ((exponent < _LOWEST) & ~empty).any():
        return None
    scale = np.ldexp(np.float32(1), np.clip(exponent, _LOWEST, _HIGHEST)).astype(np.float32)
    scales = np.repeat(target.scale.to_code(scale), 2, axis=-1)
    global_scale = np.ldexp(np.float32(1), base).astype(np.float32)
    return QuantizedTensor(target, tensor.shape, tensor.codes, scales, np.asarray(global_scale))


def _zero_blocks(tensor: QuantizedTensor) -> NDArray[Any]:
    """Which blocks of 32 hold only zeros."""
    magnitudes = (tensor.codes & 0x77).reshape(*tensor.scales.shape, 16)
    return np.asarray(~magnitudes.any(axis=-1))
