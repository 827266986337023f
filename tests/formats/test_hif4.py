from __future__ import annotations

import numpy as np

from halfbyte.formats import QuantizedTensor, get_format
from halfbyte.formats.packing import unpack_nibbles
from halfbyte.kernels import use_backend
from halfbyte.search import encode

from .streams import random_bytes


def random_tensor() -> QuantizedTensor:
    """Any nibbles and micro exponents; E6M2 codes around 1."""
    words = random_bytes((2, 3, 4), 1)
    words[..., 0] = random_bytes((2, 3), 2, 150, 230)
    return QuantizedTensor(get_format("hif4"), (2, 192), random_bytes((2, 96), 3), words.view(np.uint32)[..., 0])


def test_decoding_follows_the_bit_layout_element_by_element() -> None:
    # arXiv 2602.11287: bits 7:0 E6M2 (bias 48), 15:8 an exponent bit per 8, 31:16 per 4 elements; nibbles S1P2
    q = random_tensor()
    codes, decoded = unpack_nibbles(q.codes), q.decode()
    assert np.array_equal(decoded, q.format.decode(q))  # the reference
    for i in range(2):
        for j in range(192):
            word, k = int(q.scales[i, j // 64]), j % 64
            scale = (4 + (word & 3)) / 4 * 2.0 ** ((word >> 2 & 63) - 48)
            e8, e16 = word >> (8 + k // 8) & 1, word >> (16 + k // 4) & 1
            sign = -1 if codes[i, j] & 8 else 1
            assert decoded[i, j] == sign * (int(codes[i, j]) & 7) / 4 * 2.0 ** (e8 + e16) * scale


def test_sixty_four_elements_take_36_bytes() -> None:
    assert get_format("hif4").nbytes((1, 64)) == 36


def test_the_largest_element_is_seven_scales() -> None:
    q = QuantizedTensor(
        get_format("hif4"), (1, 64), np.full((1, 32), 0x77, np.uint8), np.array([[0xFFFFFF00 | 192]], np.uint32)
    )
    assert q.decode().max() == 7.0


def test_the_reference_sets_an_exponent_bit_where_a_group_needs_it() -> None:
    x = np.ones((1, 64), np.float32)
    x[0, 0], x[0, 21] = 7, -3  # 7 needs both bits; 3 only that of its group of 4
    with use_backend("reference"):
        q = encode(x, "hif4", "absmax")
    assert int(q.scales[0, 0]) == 48 << 2 | 1 << 8 | 1 << 16 | 1 << (16 + 5)
    assert q.decode().tolist() == x.tolist()
