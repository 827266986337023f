"""Symmetric INT4 in groups along K, BF16 scales: what compressed-tensors calls pack-quantized W4A16."""

from halfbyte.formats import codebooks as codebooks
from halfbyte.formats import scales
from halfbyte.formats.block import BlockFormat
from halfbyte.formats.registry import register

for _group in (16, 32, 64, 128):
    register(
        BlockFormat(f"int4_g{_group}", (codebooks.INT8_OFFSET,), scales.BF16, (1, _group)),
        *(("int4",) if _group == 128 else ()),
    )
