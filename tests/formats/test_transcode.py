"""MXFP4 to NVFP4 keeps every value, or is refused."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.formats import QuantizedTensor, get_format
from halfbyte.formats.transcode import top_exponent, transcode
from halfbyte.search import encode


def mxfp4(spread: int, seed: int = 0) -> np.ndarray:
    """Blocks of 32 whose exponents span ``spread``, with an empty block."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((4, 128)).astype(np.float32)
    weight.reshape(-1, 32)[:] *= np.exp2(-np.linspace(0, spread, 16).round())[:, None].astype(np.float32)
    weight[3, 96:] = 0
    return weight


@pytest.mark.parametrize("spread", [0, 5, 14])
def test_exponents_that_fit_give_identical_values(spread: int) -> None:
    tensor = encode(mxfp4(spread), "mxfp4", "absmax")
    other = transcode(tensor, get_format("nvfp4"))
    assert other is not None
    assert other.decode().tobytes() == tensor.decode().tobytes()


def test_exponents_that_span_too_much_are_refused() -> None:
    assert transcode(encode(mxfp4(30), "mxfp4", "absmax"), get_format("nvfp4")) is None


def scaled(*exponents: int) -> QuantizedTensor:
    """A row of MXFP4 blocks of ones with scales of these powers of two."""
    codes = np.full((1, 16 * len(exponents)), 0x22, np.uint8)
    scales = np.array([exponents], np.int16) + 127
    return QuantizedTensor(get_format("mxfp4"), (1, 32 * len(exponents)), codes, scales.astype(np.uint8), None)


@pytest.mark.parametrize("top", [127, 8, 0, -100])
@pytest.mark.parametrize(("span", "fits"), [(16, True), (17, True), (18, False), (19, False)])
def test_exponents_that_span_17_fit_and_18_do_not(top: int, span: int, fits: bool) -> None:
    """E4M3 holds the powers of two from 2**-9 to 2**8."""
    tensor = scaled(top, top - span)
    other = transcode(tensor, get_format("nvfp4"))
    assert (other is not None) == fits
    if other is not None:
        assert other.decode().tobytes() == tensor.decode().tobytes()


def test_the_smallest_scales_fit_below_the_smallest_global_scale() -> None:
    tensor = scaled(-127, -126, -120)
    other = transcode(tensor, get_format("nvfp4"))
    assert other is not None
    assert other.decode().tobytes() == tensor.decode().tobytes()
    assert other.global_scale == np.float32(2.0**-126)


def test_a_group_shares_one_tensor_scale() -> None:
    gate, up = (encode(mxfp4(6, seed) * size, "mxfp4", "absmax") for seed, size in ((1, 1.0), (2, 8.0)))
    top = np.maximum(top_exponent(gate), top_exponent(up))
    pair = [transcode(t, get_format("nvfp4"), top) for t in (gate, up)]
    assert pair[0] is not None and pair[1] is not None
    assert pair[0].global_scale == pair[1].global_scale
    assert np.array_equal(pair[0].decode(), gate.decode())


def test_the_same_format_is_passed_through() -> None:
    tensor = encode(mxfp4(2), "int4_g32")
    assert transcode(tensor, get_format("int4_g32")) is tensor


def test_formats_without_a_lossless_way_are_refused() -> None:
    assert transcode(encode(mxfp4(2), "nvfp4"), get_format("mixfp4")) is None
