"""Compiled fake quantization equals its NumPy definition bit for bit, in every format and instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.formats import get_format, list_formats
from halfbyte.kernels import backends, use_backend
from halfbyte.kernels.fake_quantize import round_given
from halfbyte.search import encode

NATIVE = [name for name in backends() if name != "reference"]
FOUR_BITS = [f.name for f in map(get_format, list_formats()) if f.codebooks and f.bits == 4 and f.rotation is None]


def weight(shape: tuple[int, ...] = (3, 32, 256)) -> np.ndarray:
    return (np.random.default_rng(6).standard_t(4, shape) * 0.02).astype(np.float32)


@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize("name", FOUR_BITS)
def test_given_scales(name: str, isa: str) -> None:
    tensor = encode(weight(), name, "absmax")
    tensor.scales[0, 0, 0] = 0
    moved = (weight() * np.float32(1.3)).astype(np.float32)
    moved[0, 1, :4] = (0.0, -0.0, 1e30, -1e30)
    with use_backend(isa):
        native = round_given(tensor, moved)
    assert native is not None
    rounded, values, passes = native
    wanted = tensor.format.round_to(tensor, moved)
    np.testing.assert_array_equal(rounded.codes, wanted.codes)
    assert values.tobytes() == wanted.decode().tobytes()
    low, high = tensor.format.value_range(wanted)
    np.testing.assert_array_equal(passes, (np.minimum(low, high) <= moved) & (moved <= np.maximum(low, high)))


def test_a_stored_reciprocal_is_divided_by() -> None:
    tensor = encode(weight((16, 64)), "nvfp4", "absmax", global_scale_inv=np.float32(1234.5))
    native = round_given(tensor, weight((16, 64)))
    assert native is not None
    assert native[1].tobytes() == tensor.format.round_to(tensor, weight((16, 64))).decode().tobytes()


def test_what_has_no_compiled_code_is_left_to_numpy() -> None:
    with use_backend("reference"):
        assert round_given(encode(weight(), "nvfp4", "absmax"), weight()) is None
    assert round_given(encode(weight(), "affine4_g32", "absmax"), weight()) is None
