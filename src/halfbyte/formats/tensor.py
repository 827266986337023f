"""A quantized tensor: codes, block scales and, where the format has one, a global scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from halfbyte.formats.format import Format


_decoders: list[Callable[[QuantizedTensor, NDArray[Any]], bool]] = []


def add_decoder(decoder: Callable[[QuantizedTensor, NDArray[Any]], bool]) -> None:
    """Offer a faster way to decode: it fills an array with the reference's values, or returns False."""
    _decoders.append(decoder)


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
        out = np.empty(self.shape, dtype=dtype)
        if any(decoder(self, out) for decoder in _decoders):
            return out
        return np.asarray(self.format.decode(self).astype(dtype, copy=False))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        arrays = (self.codes, self.scales, self.global_scale, self.offsets, self.rotation)
        return sum(a.nbytes for a in arrays if a is not None)

    @property
    def codebooks(self) -> NDArray[np.uint8]:
        """Index of the table that each block chose, shaped like ``scales`` (all zero for one-table formats)."""
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
