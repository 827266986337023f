"""Block formats of llama.cpp that are a codebook times an FP16 scale: 32 weights, no global scale.

The values are those of gguf's own dequantization: Q4_0 is (code - 8) * d, Q8_0 is a signed byte times d, IQ4_NL a
codebook of 16 integers times d. Scales are positive here, which the layout does not demand. The MX and NVFP4 formats
of llama.cpp are ``mxfp4`` and ``nvfp4`` themselves.
"""

from __future__ import annotations

import numpy as np

from halfbyte.formats import codebooks as codebooks
from halfbyte.formats import scales
from halfbyte.formats.arrays import Codes, Floats
from halfbyte.formats.block import BlockFormat
from halfbyte.formats.codebooks import Codebook
from halfbyte.formats.registry import register
from halfbyte.formats.signed import IQ4_NL_CODEBOOK


def _round_int8(codebook: Codebook, z: Floats) -> Codes:
    return np.rint(np.clip(z, np.float32(-127), np.float32(127))).astype(np.int8).view(np.uint8)


INT8 = Codebook(
    "int8",
    tuple(float(v) for v in (*range(128), *range(-128, 0))),
    127.0,
    _round_int8,
    unused=(128,),
    kind="int8",
)
"""Signed bytes -127..127, two's complement."""

Q4_0 = register(BlockFormat("q4_0", (codebooks.INT8_OFFSET,), scales.FP16, (1, 32)))
Q8_0 = register(BlockFormat("q8_0", (INT8,), scales.FP16, (1, 32)))
IQ4_NL = register(BlockFormat("iq4_nl_g32", (IQ4_NL_CODEBOOK,), scales.FP16, (1, 32)))
