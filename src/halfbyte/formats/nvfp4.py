"""NVFP4: E2M1 in blocks of 16, E4M3 scales, one FP32 tensor scale (NVIDIA)."""

from halfbyte.formats import scales, tables
from halfbyte.formats.base import register
from halfbyte.formats.block import BlockFormat

NVFP4 = register(BlockFormat("nvfp4", (tables.E2M1,), scales.E4M3, (1, 16), has_tensor_scale=True))
NVINT4 = register(BlockFormat("nvint4", (tables.INT7_SIGN_MAGNITUDE,), scales.E4M3, (1, 16), has_tensor_scale=True))
"""NVFP4's layout with integers -7..7 (the INT half of MixFP4 alone)."""
