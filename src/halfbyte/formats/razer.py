"""RaZeR: the redundant minus zero of E2M1 becomes a special value (arXiv 2501.04052)."""

from halfbyte.formats import codebooks as codebooks
from halfbyte.formats import scales
from halfbyte.formats.block import BlockFormat
from halfbyte.formats.registry import register

_FIVE = (codebooks.e2m1_with(5.0), codebooks.e2m1_with(-5.0))
_EIGHT = (codebooks.e2m1_with(8.0), codebooks.e2m1_with(-8.0))

RAZER = register(BlockFormat("razer", _FIVE, scales.E4M3, (1, 16), has_global_scale=True, order=(0, 1)))
"""Special value +5 or -5 by bit 7 of the E4M3 scale."""

RAZER_E3M3 = register(
    BlockFormat("razer_e3m3", _FIVE + _EIGHT, scales.E3M3, (1, 16), has_global_scale=True, order=(0, 1, 2, 3))
)
"""The paper's weight form: 6-bit E3M3 scale and two bits that choose +5, -5, +8 or -8."""
