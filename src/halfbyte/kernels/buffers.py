"""Arrays of other libraries as NumPy arrays on the same memory."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import FormatError


def as_array(values: Any) -> NDArray[Any]:
    """A NumPy array; torch CPU tensors (BF16 too) and NumPy arrays are not copied."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(values, torch.Tensor):
        return np.asarray(values)
    if values.device.type != "cpu":
        raise FormatError(f"a tensor on {values.device} cannot be quantized on the CPU; pass tensor.cpu()")
    values = values.detach()
    if values.dtype == torch.bfloat16:
        return np.asarray(values.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(values.numpy())
