"""Rounding to scales that are given, for every format of the registry."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from halfbyte.formats import get_format, list_formats
from halfbyte.formats.codebooks import Codebook
from halfbyte.formats.given_scales import inverse_of, scaled, thresholds
from halfbyte.search import encode

FORMATS = [*list_formats(), "nvfp4_hadamard", "mixfp4_duquant"]
CODEBOOKS = {c.name: c for name in FORMATS for c in get_format(name).plain.codebooks if c.bits == 4}


def weight() -> NDArray[np.float32]:
    rng = np.random.default_rng(5)
    return (rng.standard_t(4, (2, 128, 256)) * 0.02).astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_decoded_values_keep_their_codes(name: str) -> None:
    fmt = get_format(name)
    tensor = fmt.plain.round_to(plain := fmt.to_plain(encode(weight(), fmt, "absmax")), plain.decode())
    np.testing.assert_array_equal(tensor.decode(), plain.decode())


@pytest.mark.parametrize("name", FORMATS)
def test_values_between_the_ends_of_their_cells_keep_their_codes(name: str) -> None:
    fmt = get_format(name)
    tensor = encode(weight(), fmt, "absmax")
    values = fmt.to_plain(tensor).decode()
    for end in fmt.cells(tensor):
        moved = values + np.float32(0.95) * (end - values)
        np.testing.assert_array_equal(fmt.to_plain(fmt.round_to(tensor, moved)).decode(), values)


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_finds_the_nearest_of_its_block(name: str) -> None:
    fmt = get_format(name)
    tensor = fmt.to_plain(encode(weight(), fmt, "absmax"))
    moved = tensor.decode() * np.float32(1.1) + np.float32(0.003)
    rounded = fmt.plain.round_to(tensor, moved)
    low, high = fmt.plain.value_range(tensor)
    clipped = np.clip(moved, np.minimum(low, high), np.maximum(low, high))
    first, last = fmt.plain.cells(rounded)
    slack = 1e-2 * np.abs(clipped) + 1e-9  # HiF4 multiplies by inverses in BF16
    inside = (first - slack <= clipped) & (clipped <= last + slack)
    assert inside.all()


def test_a_scale_of_zero_gives_zeros() -> None:
    zeros = encode(np.zeros((2, 32), np.float32), "nvfp4", "absmax")
    assert not zeros.format.round_to(zeros, np.ones((2, 32), np.float32)).decode().any()


def test_scaling_gives_no_minus_zero() -> None:
    z = scaled(np.array([-0.0, -1.0], np.float32), inverse_of(np.array([2.0, 0.0], np.float32)))
    assert not np.signbit(z).any()


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_gets_the_codes_of_its_encoder_under_the_encoders_scales(name: str) -> None:
    fmt = get_format(name)
    bf16 = weight().astype(ml_dtypes.bfloat16)  # its values often lie on ties
    tensor = encode(bf16, fmt, "absmax")
    again = fmt.round_to(tensor, fmt.in_block_space(tensor, bf16.astype(np.float32))[1])
    np.testing.assert_array_equal(again.decode(), tensor.decode())


@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=lambda c: c.name)
def test_thresholds_are_those_of_the_codebooks_rounding(codebook: Codebook) -> None:
    ends, codes = thresholds(codebook)
    rng = np.random.default_rng(1)
    z = np.concatenate([rng.normal(0, 4, 4000).astype(np.float32), ends[np.isfinite(ends)]])
    z = np.concatenate([z, np.nextafter(z, np.float32(-np.inf)), np.nextafter(z, np.float32(np.inf))]) + np.float32(0)
    np.testing.assert_array_equal(codes[np.searchsorted(ends, z, side="right")], codebook.encode(z))
