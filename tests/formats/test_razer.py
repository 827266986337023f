"""RaZeR: minus zero of E2M1 becomes a special value that bits above the scale choose."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.formats import QuantizedTensor, get_format
from halfbyte.search import encode


@pytest.mark.parametrize(
    ("name", "one", "bits", "specials"), [("razer", 0x38, 7, [5, -5]), ("razer_e3m3", 0x18, 6, [5, -5, 8, -8])]
)
def test_selector_bits_choose_what_minus_zero_stands_for(name: str, one: int, bits: int, specials: list[int]) -> None:
    codes = np.full((1, 8), 0x78, np.uint8)  # minus zero and 6, in turn
    for selector, special in enumerate(specials):
        scales = np.array([[one | selector << bits]], np.uint8)
        q = QuantizedTensor(get_format(name), (1, 16), codes, scales, np.float32(1))
        assert q.decode()[0, :2].tolist() == [special, 6]


@pytest.mark.parametrize(("name", "special"), [("razer", 5), ("razer", -5), ("razer_e3m3", 8), ("razer_e3m3", -8)])
def test_a_block_takes_the_special_value_that_fits_it(name: str, special: float) -> None:
    x = np.array([[special, 6 if abs(special) < 6 else 4, 1, -2] + [0.5] * 12], np.float32)
    q = encode(x, name, "sweep", global_scale=1.0)
    assert q.decode().tolist() == x.tolist()
    codebook = get_format(name).codebooks[int(q.codebooks[0, 0])]
    assert codebook.array[8] == special


def test_of_equal_codebooks_the_first_one_wins() -> None:
    x = np.array([[6, -6, 4, 3, -2, 1.5, 1, 0.5] * 2], np.float32)
    for name in ("razer", "razer_e3m3"):
        assert encode(x, name, "sweep", global_scale=1.0).codebooks.tolist() == [[0]]
