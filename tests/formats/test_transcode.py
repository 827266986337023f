"""MXFP4 to NVFP4 keeps every value, or is refused."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.formats import get_format
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
