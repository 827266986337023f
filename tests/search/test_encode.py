from __future__ import annotations

import numpy as np
import pytest

from formats.cases import draw
from halfbyte.errors import FormatError
from halfbyte.search import encode


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_weight_is_refused_with_its_index(bad: float) -> None:
    x = np.ones((4, 32), dtype=np.float32)
    x[2, 7] = bad
    with pytest.raises(FormatError, match=r"NaN or infinity, first at index \[2, 7\]"):
        encode(x, "nvfp4")


def test_a_float64_beyond_fp32_is_refused() -> None:
    with pytest.raises(FormatError, match="NaN or infinity"), np.errstate(over="ignore"):
        encode(np.full((1, 16), 1e300), "nvfp4")


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "bool", "complex64"])
def test_values_that_are_no_floats_are_refused(dtype: str) -> None:
    with pytest.raises(FormatError, match=f"cannot quantize values of type {dtype}"):
        encode(np.ones((2, 32), dtype=dtype), "nvfp4")


@pytest.mark.parametrize("importance", [np.ones(31), np.ones((2, 32)), np.ones((3, 32, 1)), np.float32(1)])
def test_importance_of_another_shape_is_refused(importance: np.ndarray) -> None:
    with pytest.raises(FormatError, match=r"importance has shape .* but the weight needs \[32\] or \[3, 32\]"):
        encode(np.ones((3, 4, 32), dtype=np.float32), "nvfp4", importance=importance)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_importance_that_is_no_weight_is_refused(bad: float) -> None:
    importance = np.ones(32)
    importance[3] = bad
    with pytest.raises(FormatError, match="finite and not negative"):
        encode(np.ones((4, 32), dtype=np.float32), "nvfp4", importance=importance)


def test_importance_of_zeros_counts_as_none() -> None:
    x = draw("normal", (4, 64), 0)
    assert np.array_equal(encode(x, "nvfp4", importance=np.zeros(64)).codes, encode(x, "nvfp4").codes)


def test_each_expert_may_have_its_own_importance() -> None:
    x = draw("normal", (2, 4, 64), 0)
    importance = np.abs(draw("heavy", (2, 64), 1)) ** 2
    both = encode(x, "nvfp4", importance=importance)
    for e in range(2):
        assert np.array_equal(encode(x[e], "nvfp4", importance=importance[e]).codes, both.codes[e])


@pytest.mark.parametrize("name", ["fp8_block128", "int4_g32", "hif4", "affine4_g32", "mxfp4"])
def test_importance_protects_the_columns_that_matter(name: str) -> None:
    x = draw("heavy", (256, 256), 2)
    importance = np.where(np.arange(256) % 8 == 0, 100.0, 0.1)
    error = [(encode(x, name, importance=i).decode() - x) ** 2 @ importance for i in (None, importance)]
    assert error[1].sum() < 0.995 * error[0].sum()


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, 1e-40])
def test_a_tensor_scale_that_cannot_divide_is_refused(bad: float) -> None:
    with pytest.raises(FormatError, match="finite and positive"):
        encode(np.ones((1, 16), dtype=np.float32), "nvfp4", global_scale=bad)


@pytest.mark.parametrize("argument", ["global_scale", "amax"])
def test_a_tensor_scale_or_amax_of_another_shape_is_refused(argument: str) -> None:
    with pytest.raises(FormatError, match=rf"{argument} has shape \[3\], but the weight needs \[2\] or one number"):
        encode(np.ones((2, 4, 16), dtype=np.float32), "nvfp4", **{argument: np.ones(3)})  # type: ignore[arg-type]


def test_a_format_without_tensor_scale_refuses_one() -> None:
    with pytest.raises(FormatError, match="mxfp4 has no global scale"):
        encode(np.ones((1, 32), dtype=np.float32), "mxfp4", global_scale=1.0)


def test_one_tensor_scale_serves_all_experts() -> None:
    x = draw("normal", (3, 4, 32), 0)
    q = encode(x, "nvfp4", global_scale=0.01)
    assert q.global_scale is not None and q.global_scale.tolist() == [np.float32(0.01)] * 3


@pytest.mark.parametrize("name", ["nvfp4", "mixfp4", "fp8_tensor"])
def test_slices_with_the_whole_amax_are_encoded_as_the_whole(name: str) -> None:
    x = draw("normal", (8, 64), 0)
    whole, amax = encode(x, name), np.abs(x).max()
    for part in (slice(0, 3), slice(3, 8)):
        assert np.array_equal(encode(x[part], name, amax=amax).codes, whole.codes[part])


def test_a_tensor_scale_that_is_too_small_saturates() -> None:
    x = draw("normal", (2, 32), 0)
    with np.errstate(over="ignore"):
        q = encode(x, "nvfp4", global_scale=2.0**-120)
    assert np.array_equal(np.abs(q.decode()), np.full((2, 32), 2688 * 2.0**-120, dtype=np.float32))


@pytest.mark.parametrize("name", ["nvfp4", "if4", "iq4_nl"])
def test_a_power_of_two_tensor_scale_is_the_next_one_above(name: str) -> None:
    x = draw("normal", (4, 64), 0)
    plain, power = encode(x, name), encode(x, name, power_of_two=True)
    assert plain.global_scale is not None and power.global_scale is not None
    assert np.log2(power.global_scale) == np.ceil(np.log2(plain.global_scale))


def test_a_power_of_two_tensor_scale_makes_values_exact_in_bf16() -> None:
    import ml_dtypes

    decoded = encode(draw("normal", (16, 256), 0), "nvfp4", power_of_two=True).decode()
    assert np.array_equal(decoded, decoded.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_the_weight_is_left_as_it_is() -> None:
    x = draw("normal", (8, 128), 0)
    before = x.copy()
    for name in ("nvfp4", "affine4_g32", "hif4", "fp8_block128"):
        encode(x, name)
    assert np.array_equal(x, before)


def test_rows_of_a_transposed_view_are_read_in_order() -> None:
    x = draw("normal", (64, 48), 0)
    assert np.array_equal(encode(x.T, "nvfp4").codes, encode(x.T.copy(), "nvfp4").codes)


def test_a_weight_larger_than_the_working_set_is_encoded_as_its_parts() -> None:
    x = draw("normal", (600, 512), 0)
    whole = encode(x, "mixfp4", global_scale=0.001)
    assert np.array_equal(whole.codes[511:], encode(x[511:], "mixfp4", global_scale=0.001).codes)
