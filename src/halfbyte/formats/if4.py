"""IF4: E2M1 or integers -7..7 scaled by 6/7, one shared scale (arXiv 2603.28765, fouroversix)."""

from halfbyte.formats import codebooks as codebooks
from halfbyte.formats import scales
from halfbyte.formats.block import BlockFormat
from halfbyte.formats.registry import register

IF4 = register(
    BlockFormat(
        "if4",
        (codebooks.E2M1, codebooks.IF4_INT),
        scales.E4M3,
        (1, 16),
        has_global_scale=True,
        order=(0, 1),
        shared_base=True,
    )
)
