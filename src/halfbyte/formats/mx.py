"""OCP microscaling formats: blocks of 32 with a power-of-two scale (MX specification 1.0)."""

from halfbyte.formats import scales, tables
from halfbyte.formats.base import register
from halfbyte.formats.block import BlockFormat

MXFP4 = register(BlockFormat("mxfp4", (tables.E2M1,), scales.E8M0, (1, 32)))
MXFP8 = register(BlockFormat("mxfp8", (tables.E4M3,), scales.E8M0, (1, 32)))
