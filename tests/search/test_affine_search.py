from __future__ import annotations

import numpy as np
import pytest

from formats.cases import draw
from halfbyte.search import encode


def groups(name: str, x: np.ndarray, search: str = "absmax") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q = encode(x, name, search)
    assert q.offsets is not None
    return q.decode(), q.scales.astype(np.float32), q.offsets.astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_end_of_larger_magnitude_is_the_bias(bits: int) -> None:
    x = draw("normal", (2, 128), 0)
    _, scales, biases = groups(f"affine{bits}_g64", x)
    low, high = (f(x.reshape(2, 2, 64), axis=2) for f in (np.min, np.max))
    expected = np.where(np.abs(low) > np.abs(high), low, high)
    np.testing.assert_allclose(biases, expected, rtol=2**-8)
    assert np.array_equal(scales > 0, np.abs(low) > np.abs(high))


def test_zero_lies_a_whole_number_of_steps_from_the_bias() -> None:
    x = draw("normal", (4, 256), 1)
    _, scales, biases = groups("affine4_g32", x)
    np.testing.assert_allclose(biases / scales, np.rint(biases / scales), atol=0.1)


@pytest.mark.parametrize("sign", [1, -1])
def test_groups_on_one_side_of_zero_use_all_levels(sign: int) -> None:
    x = sign * np.linspace(1, 2, 64, dtype=np.float32)[None]
    for name in ("affine4_g64", "affine8_g64"):
        decoded, _, _ = groups(name, x)
        assert np.abs(decoded - x).max() < (0.06 if "4" in name.split("_")[0] else 0.02)


def test_asymmetric_int4_always_has_a_code_for_zero() -> None:
    x = draw("uniform", (4, 128), 2) + np.float32(3)
    x[:, ::7] = 0
    decoded, _, zeros = groups("int4_asym_g32", x)
    assert not decoded[:, ::7].any()
    assert (zeros == 0).all()


def test_asymmetric_int4_on_negative_groups_puts_zero_at_the_top() -> None:
    x = -np.abs(draw("normal", (2, 64), 3))
    _, _, zeros = groups("int4_asym_g32", x)
    assert (zeros == 15).all()


@pytest.mark.parametrize("name", ["affine4_g32", "int4_asym_g32"])
def test_weights_far_smaller_than_one_keep_their_precision(name: str) -> None:
    # MLX's own quantizer has a floor of 1e-7 for the step
    x = draw("normal", (2, 64), 4)
    normal = np.linalg.norm(encode(x, name).decode() - x) / np.linalg.norm(x)
    small = x * np.float32(2.0**-60)
    tiny = np.linalg.norm(encode(small, name).decode() - small) / np.linalg.norm(small)
    assert tiny == pytest.approx(normal, rel=1e-5)


def test_shrinking_the_range_helps_where_one_element_is_far_out() -> None:
    x = draw("normal", (8, 128), 5)
    x[:, ::32] *= 2
    swept, plain = (np.linalg.norm(encode(x, "affine4_g32", s).decode() - x) for s in ("sweep", "absmax"))
    assert swept < 0.99 * plain
