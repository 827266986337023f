"""Reference encoder of HiF4 (arXiv 2602.11287): the E6M2 scale may be swept, the micro exponents follow."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import scales
from halfbyte.formats.hif4 import micro_scales
from halfbyte.search.reference import loss_of
from halfbyte.search.searches import Search

Floats = NDArray[np.float32]
_LARGEST = np.float32(7 * scales.E6M2.maximum)


def encode_hif4(x: Floats, search: Search, weight: Floats | None) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Codes [n, 64] and 32-bit scale words [n] of blocks x [n, 64]."""
    magnitude = np.minimum(np.abs(x), _LARGEST)
    fours = magnitude.reshape(-1, 16, 4).max(axis=2)
    eights = fours.reshape(-1, 8, 2).max(axis=2)
    seventh = np.float32(ml_dtypes.bfloat16(1 / 7))
    largest = (eights.max(axis=1) * seventh).astype(ml_dtypes.bfloat16).astype(np.float32)
    base = scales.E6M2.to_code(np.where(largest == 0, np.float32(1), largest)).astype(np.int32)
    best = np.full(len(x), np.inf, dtype=np.float32)
    codes, words = np.zeros(x.shape, dtype=np.uint8), np.zeros(len(x), dtype=np.uint32)
    # an E6M2 step is a quarter octave: the window of the sweep is that of E4M3 in value
    for offset in sorted({0, *(o // 2 for o in search.offsets)}, key=lambda o: (o < 0, abs(o))):
        code = np.clip(base + offset, 0, 254).astype(np.uint8)
        step = scales.E6M2.to_value(code)
        inverse = (np.float32(1) / step).astype(ml_dtypes.bfloat16).astype(np.float32)[:, None]
        e8 = eights * inverse >= 4
        e16 = fours * inverse * np.exp2(-np.repeat(e8, 2, axis=1).astype(np.float32)) >= 2
        bits = np.concatenate([e8, e16], axis=1).astype(np.uint32)
        word = code | (bits << np.arange(8, 32, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
        micro = np.repeat(micro_scales(word), 4, axis=1)
        # magnitudes in quarters, halves rounded up
        quarters = np.minimum(np.floor(magnitude * inverse / micro * 4 + np.float32(0.5)), 7).astype(np.uint8)
        value = quarters.astype(np.float32) * np.float32(0.25) * micro
        loss = loss_of(value - magnitude / step[:, None], weight, "sse") * (step * step)
        better = loss < best
        best[better], words[better] = loss[better], word[better]
        codes[better] = (quarters | (np.signbit(x).astype(np.uint8) << 3))[better]
    zero = ~np.any(x, axis=1)
    codes[zero], words[zero] = 0, 0
    return codes, words
