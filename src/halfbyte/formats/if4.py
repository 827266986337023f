"""IF4: E2M1 or integers -7..7 scaled by 6/7, one shared scale (arXiv 2603.28765, fouroversix)."""

from halfbyte.formats import scales, tables
from halfbyte.formats.base import register
from halfbyte.formats.block import BlockFormat

IF4 = register(
    BlockFormat(
        "if4",
        (tables.E2M1, tables.IF4_INT),
        scales.E4M3,
        (1, 16),
        has_tensor_scale=True,
        order=(0, 1),
        shared_base=True,
    )
)
