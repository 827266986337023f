"""FP8 (E4M3) weights with a scale per tensor, per output channel, or per 128x128 block."""

from halfbyte.formats import codebooks as codebooks
from halfbyte.formats import scales
from halfbyte.formats.block import BlockFormat
from halfbyte.formats.registry import register

FP8_TENSOR = register(BlockFormat("fp8_tensor", (codebooks.E4M3,), scales.FP32, (-1, -1)))
FP8_CHANNEL = register(BlockFormat("fp8_channel", (codebooks.E4M3,), scales.BF16, (1, -1)), "fp8")
FP8_BLOCK = register(BlockFormat("fp8_block128", (codebooks.E4M3,), scales.FP32, (128, 128)), "fp8_block")
