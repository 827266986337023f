"""Decoding quantized arrays with torch, bit for bit as ``QuantizedTensor.decode`` does it with NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from halfbyte.dialects.halfbyte import stored_arrays
from halfbyte.formats import QuantizedTensor
from halfbyte.runtime.remote.halfbyte_modules import Decoder


def to_torch(array: NDArray[Any]) -> torch.Tensor:
    """The same bits as a torch tensor (which shares the memory); knows BF16."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def decode(tensor: QuantizedTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Values [..., N, K] of a quantized tensor: computed in FP32, then rounded to ``dtype`` (default FP32)."""
    if tensor.global_scale_inv is not None:
        # a stored reciprocal is divided by, which the modules never do
        values = torch.from_numpy(tensor.decode())
    else:
        arrays = {part: to_torch(array) for part, array in stored_arrays(tensor).items()}
        values = Decoder(tensor.format.describe())(**arrays)
    return values.to(dtype or torch.float32)
