"""OCP microscaling formats: blocks of 32 with a power-of-two scale (MX specification 1.0)."""

from halfbyte.formats import codebooks as codebooks
from halfbyte.formats import scales
from halfbyte.formats.block import BlockFormat
from halfbyte.formats.registry import register
from halfbyte.formats.rotated_format import rotated

MXFP4 = register(BlockFormat("mxfp4", (codebooks.E2M1,), scales.E8M0, (1, 32)))
MXFP8 = register(BlockFormat("mxfp8", (codebooks.E4M3,), scales.E8M0, (1, 32)))

MXFP4_HADAMARD = register(rotated(MXFP4, "hadamard"))
"""MXFP4 of weights times the Hadamard matrix of 32 (MR-GPTQ, arXiv 2509.23202)."""
MXFP4_DUQUANT = register(rotated(MXFP4, "duquant"))
"""MXFP4 of weights whose blocks are rotated so that large activations are spread (DuQuant++, arXiv 2604.17789)."""
