"""NVFP4: E2M1 in blocks of 16, E4M3 scales, one FP32 global scale (NVIDIA)."""

from halfbyte.formats import codebooks as codebooks
from halfbyte.formats import scales
from halfbyte.formats.block import BlockFormat
from halfbyte.formats.registry import register

NVFP4 = register(BlockFormat("nvfp4", (codebooks.E2M1,), scales.E4M3, (1, 16), has_global_scale=True))
NVFP4_UNSCALED = register(BlockFormat("nvfp4_unscaled", (codebooks.E2M1,), scales.E4M3, (1, 16)))
"""NVFP4 without the global scale, as MLX's layers have it: blocks below 6 x 2**-9 have no room for their scale."""

NVINT4 = register(BlockFormat("nvint4", (codebooks.INT7_SIGN_MAGNITUDE,), scales.E4M3, (1, 16), has_global_scale=True))
"""NVFP4's layout with integers -7..7 (the INT half of MixFP4 alone)."""
