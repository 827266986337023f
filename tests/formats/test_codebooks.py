from __future__ import annotations

from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest

from halfbyte.formats import BlockFormat, get_format, list_formats
from halfbyte.formats.codebooks import (
    E2M1,
    E4M3,
    IF4_INT,
    INT7_SIGN_MAGNITUDE,
    INT7_TWOS_COMPLEMENT,
    INT8_OFFSET,
    Codebook,
    e2m1_with,
)
from halfbyte.formats.signed import IQ4_NL_CODEBOOK, NF4_CODEBOOK
from halfbyte.search import encode

TABLES = {t.name: t for n in list_formats() if isinstance(f := get_format(n), BlockFormat) for t in f.codebooks}
TIES = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4}


def codes(codebook: Codebook, *values: float) -> list[int]:
    return codebook.encode(np.array(values, dtype=np.float32)).tolist()


def grid(codebook: Codebook) -> np.ndarray:
    """Every value, every midpoint, their FP32 neighbours, and values beyond the ends."""
    v = np.unique(codebook.array[np.isfinite(codebook.array)])
    points = np.concatenate([v, (v[1:] + v[:-1]) / 2, [2 * v[0], 2 * v[-1], 1e30, -1e30]]).astype(np.float32)
    inf = np.float32(np.inf)
    return np.concatenate([points, np.nextafter(points, inf), np.nextafter(points, -inf)])


def test_e2m1_holds_the_values_of_ml_dtypes() -> None:
    theirs = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(E2M1.array, theirs)
    assert np.array_equal(np.signbit(E2M1.array), np.signbit(theirs))


def test_e4m3_holds_the_values_of_ml_dtypes() -> None:
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(E4M3.array, theirs, equal_nan=True)


@pytest.mark.parametrize("sign", [1, -1])
def test_e2m1_rounds_ties_to_the_even_code_value(sign: int) -> None:
    found = E2M1.array[codes(E2M1, *(sign * t for t in TIES))]
    assert found.tolist() == [sign * v for v in TIES.values()]


def test_e2m1_saturates_at_six_and_keeps_the_sign_of_zero() -> None:
    assert codes(E2M1, 6.5, 1e30, np.inf, -7.0, -0.0, 0.0, -0.1) == [7, 7, 7, 15, 8, 0, 8]


def test_e4m3_saturates_at_448_and_never_writes_nan() -> None:
    assert codes(E4M3, 448.0, 464.0, 1e30, -1e30) == [0x7E, 0x7E, 0x7E, 0xFE]


@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_channel", "fp8_block128", "mxfp8"])
def test_the_largest_element_of_a_block_becomes_448(name: str) -> None:
    x = np.zeros((1, 128), np.float32)
    x[0, :3] = [448, -3, 0.5]
    q = encode(x, name, "absmax")
    assert q.format.split_scales(q.scales)[0].ravel()[0] == 1
    assert q.codes[0, :3].tolist() == [0x7E, 0xC4, 0x30]


@pytest.mark.parametrize("codebook", [INT7_SIGN_MAGNITUDE, INT7_TWOS_COMPLEMENT], ids=lambda t: t.name)
def test_int7_rounds_half_to_even_and_clips_at_seven(codebook: Codebook) -> None:
    found = codebook.array[codes(codebook, 0.5, 1.5, 2.5, -0.5, -1.5, 6.5, 7.5, 9.0, -9.0)]
    assert found.tolist() == [0, 2, 2, 0, -2, 6, 7, 7, -7]


def test_int7_spells_minus_three_as_sign_magnitude_or_twos_complement() -> None:
    assert codes(INT7_SIGN_MAGNITUDE, -3.0) == [0b1011]
    assert codes(INT7_TWOS_COMPLEMENT, -3.0) == [0b1101]


def test_if4_integers_decode_to_sixths_of_seven_of_the_fp4_range() -> None:
    assert IF4_INT.array[7] == 6.0
    assert np.array_equal(IF4_INT.array[1:8], np.arange(1, 8, dtype=np.float32) * np.float32(6 / 7))
    assert codes(IF4_INT, 6.0, -6.0, 0.857, 100.0) == [7, 9, 1, 7]


def test_int4_codes_are_offset_by_eight_and_reach_minus_eight() -> None:
    assert codes(INT8_OFFSET, -8.0, -7.5, 0.0, 7.0, 7.5, -100.0) == [0, 0, 8, 15, 15, 0]


@pytest.mark.parametrize("special", [5.0, -5.0, 8.0, -8.0])
def test_razer_replaces_minus_zero_by_the_special_value(special: float) -> None:
    codebook = e2m1_with(special)
    assert codebook.array[8] == special
    assert codes(codebook, special, 0.0, -0.0, -0.1) == [8, 0, 0, 0]


@pytest.mark.parametrize("name", TABLES)
def test_every_element_gets_a_nearest_value(name: str) -> None:
    codebook = TABLES[name]
    used = np.delete(codebook.array.astype(np.float64), codebook.unused)
    z = grid(codebook)
    chosen = np.abs(codebook.array[codebook.encode(z)] - z.astype(np.float64))
    least = np.abs(used - z[:, None].astype(np.float64)).min(axis=1)
    # midpoints of NF4 are no FP32 numbers, and IF4 multiplies by a truncated 7/6
    assert (chosen <= least * (1 + 3e-6)).all()


@pytest.mark.parametrize("codebook", [IQ4_NL_CODEBOOK, NF4_CODEBOOK], ids=lambda t: t.name)
def test_ties_of_uneven_grids_go_to_the_smaller_magnitude(codebook: Codebook) -> None:
    v = codebook.array
    middle = ((v[1:].astype(np.float64) + v[:-1]) / 2).astype(np.float32)
    exact = middle.astype(np.float64) * 2 == v[1:].astype(np.float64) + v[:-1]
    found = np.abs(v[codebook.encode(middle[exact])])
    assert np.array_equal(found, np.minimum(np.abs(v[1:]), np.abs(v[:-1]))[exact])


@pytest.mark.parametrize("codebook", [IQ4_NL_CODEBOOK, NF4_CODEBOOK], ids=lambda t: t.name)
def test_a_mirrored_table_encodes_the_negated_elements_with_the_same_codes(codebook: Codebook) -> None:
    z = np.random.RandomState(0).uniform(-1, 1, 1000).astype(np.float32) * np.float32(codebook.top)
    assert np.array_equal(codebook.mirrored().array, -codebook.array)
    assert np.array_equal(codebook.mirrored().encode(-z), codebook.encode(z))


def test_nf4_is_the_quantiles_of_the_normal_distribution() -> None:
    # arXiv 2305.14314, appendix E: 8 levels above zero, 7 below, offset 1/2 (1/32 + 1/30)
    offset = 1 - (1 / 32 + 1 / 30) / 2
    above = [NormalDist().inv_cdf(offset + (0.5 - offset) * i / 8) for i in range(8)]
    below = [-NormalDist().inv_cdf(offset + (0.5 - offset) * i / 7) for i in range(7)]
    expected = np.array(sorted([*above, 0.0, *below])) / max(above)
    assert np.abs(NF4_CODEBOOK.array - expected).max() < 2e-6


@pytest.mark.parametrize("name", TABLES)
def test_unused_codes_are_not_the_nearest_of_anything(name: str) -> None:
    codebook = TABLES[name]
    assert not set(codebook.encode(grid(codebook)).tolist()) & set(codebook.unused)
