"""HiF4's encoder against a scalar transcription of the paper's algorithm (arXiv 2602.11287)."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from formats.cases import draw
from halfbyte.formats.packing import unpack_nibbles
from halfbyte.search import encode


def bf16(v: float) -> float:
    return float(ml_dtypes.bfloat16(np.float32(v)))


def e6m2(v: float) -> tuple[int, float]:
    """Nearest E6M2 (bias 48), ties to even: its code and value."""
    exponent = math.floor(math.log2(v))
    steps = v / 2.0 ** (exponent - 2)
    whole = math.floor(steps)
    whole += steps - whole > 0.5 or (steps - whole == 0.5 and whole % 2 == 1)
    code = (exponent + 48) * 4 + whole - 4
    return code, (4 + (code & 3)) / 4 * 2.0 ** ((code >> 2) - 48)


def transcription(block: np.ndarray) -> tuple[list[int], int]:
    """Nibbles and the scale word of 64 elements."""
    m = [abs(float(v)) for v in block]
    code, scale = e6m2(bf16(max(m) * bf16(1 / 7)))
    inverse = bf16(1 / scale)
    word, nibbles = code, []
    e8 = [max(m[8 * i : 8 * i + 8]) * inverse >= 4 for i in range(8)]
    e16 = [max(m[4 * i : 4 * i + 4]) * inverse * 2.0 ** -e8[i // 2] >= 2 for i in range(16)]
    for i, bit in enumerate(e8 + e16):
        word |= bit << (8 + i)
    for j, v in enumerate(block):
        quarters = math.floor(m[j] * inverse * 2.0 ** -(e8[j // 8] + e16[j // 4]) * 4 + 0.5)
        nibbles.append(min(quarters, 7) | (8 if math.copysign(1, v) < 0 else 0))
    return nibbles, word


@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "outlier", "ramp"])
def test_absmax_is_the_papers_algorithm(kind: str) -> None:
    # BF16 inputs, as in the paper: products with BF16 factors are then exact in FP32 and FP64
    x = draw(kind, (4, 128), 1).astype(ml_dtypes.bfloat16).astype(np.float32)
    q = encode(x, "hif4", "absmax")
    codes = unpack_nibbles(q.codes).reshape(-1, 64)
    for i, block in enumerate(x.reshape(-1, 64)):
        nibbles, word = transcription(block)
        assert int(q.scales.reshape(-1)[i]) == word
        assert codes[i].tolist() == nibbles


def test_values_beyond_the_largest_scale_saturate() -> None:
    x = np.full((1, 64), 1e9, dtype=np.float32)
    assert np.array_equal(encode(x, "hif4").decode(), np.full((1, 64), 7 * 49152, dtype=np.float32))


def test_values_below_the_smallest_scale_become_zero() -> None:
    x = np.full((1, 64), 1e-30, dtype=np.float32)
    assert not encode(x, "hif4").decode().any()
