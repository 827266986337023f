from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from halfbyte.formats import scales
from halfbyte.formats.scales import ScaleType

ORDERED = [scales.E4M3, scales.E8M0, scales.E3M3, scales.E6M2]
WIDE = [scales.BF16, scales.FP16, scales.FP32]


def all_codes(kind: ScaleType) -> np.ndarray:
    return np.arange(kind.low, kind.high + 1).astype(np.uint8)


def e3m3(code: int) -> Fraction:
    """Sign-free float with 3 exponent bits (bias 3), 3 mantissa bits and subnormals."""
    exponent, mantissa = code >> 3, code & 7
    return Fraction(mantissa, 8) / 4 if exponent == 0 else Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 3)


def e6m2(code: int) -> Fraction:
    """6 exponent bits (bias 48), 2 mantissa bits, no subnormals."""
    return Fraction(4 + (code & 3), 4) * Fraction(2) ** ((code >> 2) - 48)


@pytest.mark.parametrize(
    ("kind", "theirs"), [(scales.E4M3, ml_dtypes.float8_e4m3fn), (scales.E8M0, ml_dtypes.float8_e8m0fnu)]
)
def test_values_are_those_of_ml_dtypes_for_every_code(kind: ScaleType, theirs: type) -> None:
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(kind.to_value(codes), codes.view(theirs).astype(np.float32), equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "definition"), [(scales.E3M3, e3m3), (scales.E6M2, e6m2)])
def test_values_follow_the_definition_bit_by_bit(kind: ScaleType, definition: Callable[[int], Fraction]) -> None:
    codes = all_codes(kind)
    assert [Fraction(float(v)) for v in kind.to_value(codes)] == [definition(int(c)) for c in codes]


def test_e3m3_reaches_28_and_e6m2_reaches_its_maximum() -> None:
    assert scales.E3M3.to_value(np.array([62], dtype=np.uint8)) == 30 - 2 == scales.E3M3.maximum
    assert scales.E6M2.to_value(np.array([254], dtype=np.uint8)) == scales.E6M2.maximum


@pytest.mark.parametrize(("kind", "maximum"), [(scales.E4M3, 448), (scales.E8M0, 2.0**127), (scales.E3M3, 28)])
def test_the_highest_code_is_the_maximum(kind: ScaleType, maximum: float) -> None:
    highest = np.array([kind.high], dtype=np.uint8)
    assert kind.to_value(highest) == kind.maximum == maximum
    assert np.array_equal(kind.to_code(np.array([maximum * 1.5], np.float32)), highest)


@pytest.mark.parametrize(("kind", "lowest"), [(scales.E4M3, 1), (scales.E8M0, 0), (scales.E3M3, 1), (scales.E6M2, 0)])
def test_the_lowest_code_is_the_smallest_positive_value(kind: ScaleType, lowest: int) -> None:
    assert kind.low == lowest
    assert kind.to_code(np.array([1e-45], np.float32)).tolist() == [lowest]
    assert kind.to_value(np.array([lowest], np.uint8)) > 0


@pytest.mark.parametrize("kind", WIDE, ids=lambda k: k.name)
def test_wide_scales_fill_their_type_and_have_no_room_for_a_selector(kind: ScaleType) -> None:
    assert kind.bits == 8 * np.dtype(kind.dtype).itemsize and not kind.ordered


@pytest.mark.parametrize("kind", ORDERED, ids=lambda k: k.name)
def test_every_value_gets_its_own_code(kind: ScaleType) -> None:
    codes = all_codes(kind)
    assert np.array_equal(kind.to_code(kind.to_value(codes)), codes)


@pytest.mark.parametrize("kind", ORDERED, ids=lambda k: k.name)
def test_codes_grow_with_the_value(kind: ScaleType) -> None:
    assert (np.diff(kind.to_value(all_codes(kind))) > 0).all()


@pytest.mark.parametrize("kind", [scales.E4M3, scales.E3M3, scales.E6M2], ids=lambda k: k.name)
def test_values_between_two_codes_round_to_the_nearest_ties_to_even(kind: ScaleType) -> None:
    codes = all_codes(kind)
    v = kind.to_value(codes)
    middle = (v[1:] + v[:-1]) / 2
    expected = np.where(codes[1:] % 2 == 0, codes[1:], codes[:-1])
    assert np.array_equal(kind.to_code(middle), expected)
    assert np.array_equal(kind.to_code(np.nextafter(middle, np.float32(np.inf))), codes[1:])
    assert np.array_equal(kind.to_code(np.nextafter(middle, np.float32(0))), codes[:-1])


@pytest.mark.parametrize("kind", [*ORDERED, *WIDE], ids=lambda k: k.name)
def test_no_positive_value_becomes_a_zero_infinite_or_missing_scale(kind: ScaleType) -> None:
    v = np.array([1e-45, 1e-38, 1e-10, 1.0, 447.9, 1e10, 3e38, np.finfo(np.float32).max], dtype=np.float32)
    found = kind.to_value(kind.to_code(v))
    assert np.isfinite(found).all() and (found > 0).all()


@pytest.mark.parametrize("kind", WIDE, ids=lambda k: k.name)
def test_wide_scales_round_like_a_cast(kind: ScaleType) -> None:
    v = np.geomspace(1e-4, 6e4, 5000).astype(np.float32)
    assert np.array_equal(kind.to_value(kind.to_code(v)), v.astype(kind.dtype).astype(np.float32))
