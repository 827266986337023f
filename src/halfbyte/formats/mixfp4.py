"""MixFP4: each block of 16 chooses E2M1 or INT4 by bit 7 of its scale byte (arXiv 2605.31035).

Writers disagree on the bit and on the tie, so each convention has a name of its own; nothing is guessed.
"""

from halfbyte.formats import codebooks as codebooks
from halfbyte.formats import scales
from halfbyte.formats.block import BlockFormat
from halfbyte.formats.registry import register

_FP, _INT = codebooks.E2M1, codebooks.INT7_SIGN_MAGNITUDE

MIXFP4 = register(
    BlockFormat("mixfp4", (_FP, _INT), scales.E4M3, (1, 16), has_global_scale=True, order=(0, 1)),
    "mixfp4_compressed_tensors",
)
"""The convention of compressed-tensors #687 and vLLM #41004: bit 7 = 1 means INT4, sign-magnitude, ties to FP4."""

MIXFP4_MAKORA = register(
    BlockFormat("mixfp4_makora", (_INT, _FP), scales.E4M3, (1, 16), has_global_scale=True, order=(1, 0))
)
"""Makora's published meaning of the bit: 0 = INT4, 1 = FP4. Nibble and tie are not published; as above."""

MIXFP4_PAPER = register(
    BlockFormat("mixfp4_paper", (_FP, _INT), scales.E4M3, (1, 16), has_global_scale=True, order=(1, 0))
)
"""The paper's tie rule (INT wins); the paper leaves the bit open, taken as in ``mixfp4``."""

MIXFP4_TWOS_COMPLEMENT = register(
    BlockFormat(
        "mixfp4_twos_complement",
        (_FP, codebooks.INT7_TWOS_COMPLEMENT),
        scales.E4M3,
        (1, 16),
        has_global_scale=True,
        order=(0, 1),
    )
)
"""As ``mixfp4`` with two's complement nibbles, as IF4 spells its integers."""
