"""Random quantized weights of the formats that have a product on GPUs."""

from __future__ import annotations

import numpy as np
from tests.kernels import linear_cases

from halfbyte.formats import QuantizedTensor, get_format, list_formats
from halfbyte.gpu.table_layout import describe_tables
from halfbyte.kernels.linear import NoKernelError


def _has_product(name: str) -> bool:
    try:
        describe_tables(get_format(name))
    except NoKernelError:
        return False
    return True


FORMATS = [name for name in list_formats() if _has_product(name)]


def weight(name: str, shape: tuple[int, ...], seed: int = 0) -> QuantizedTensor:
    """Random codes that encoders write, scales of all sizes and both selectors."""
    tensor = linear_cases.weight(name, shape, seed)
    unused = {code for codebook in getattr(tensor.format, "codebooks", ()) for code in codebook.unused}
    for code in unused:
        tensor.codes[tensor.codes & 15 == code] ^= 1
        tensor.codes[tensor.codes >> 4 == code] ^= 16
    if tensor.global_scale is not None:
        tensor.global_scale = np.asarray(tensor.global_scale * np.float32(0.37))
    return tensor
