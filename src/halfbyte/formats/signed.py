"""Signed codebooks: an asymmetric codebook whose mirror image is reached by a negative scale."""

from halfbyte.formats import scales
from halfbyte.formats.block import BlockFormat
from halfbyte.formats.codebooks import Codebook
from halfbyte.formats.registry import register

IQ4_NL_CODEBOOK = Codebook(
    "iq4_nl",
    tuple(float(v) for v in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)),
    127.0,
)
"""The non-linear 4-bit grid of llama.cpp's IQ4_NL."""

NF4_CODEBOOK = Codebook(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    1.0,
)
"""NormalFloat-4 (arXiv 2305.14314, appendix E)."""

for _codebook in (IQ4_NL_CODEBOOK, NF4_CODEBOOK):
    register(
        BlockFormat(
            _codebook.name,
            (_codebook, _codebook.mirrored()),
            scales.E4M3,
            (1, 16),
            has_global_scale=True,
            order=(0, 1),
            global_top=_codebook.top,
        )
    )
