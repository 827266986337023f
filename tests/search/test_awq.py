"""AWQ smoothing on arrays: nothing changes but the quantizer's error, which never grows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import FormatError
from halfbyte.formats import get_format
from halfbyte.search import encode
from halfbyte.search.awq import (
    Consumer,
    choose_scale,
    scale_from,
    smooth_columns,
    smooth_norm,
    weighted_error,
)
from halfbyte.source.smoothing import Smoothing

BF16 = ml_dtypes.bfloat16
K = 128


def layer(seed: int = 0) -> tuple[Any, Any, Any]:
    """Weights [32, K], and inputs [512, K] whose channels differ in size, with their mean squares."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(512, K)) * np.exp(rng.normal(size=K))
    return rng.normal(size=(32, K)).astype(np.float32), x, np.square(x).mean(0).astype(np.float32)


def consumer(weight: Any, importance: Any, fmt: str | None = "int4_g128", **more: Any) -> Consumer:
    return Consumer("w", weight, importance, get_format(fmt) if fmt else None, **more)


def test_the_scale_is_a_power_of_importance_centred_on_one() -> None:
    scale = scale_from(np.float32([1, 4, 16]), 0.5)
    np.testing.assert_allclose(scale, [0.5, 1, 2], rtol=1e-6)


def test_exponent_zero_scales_nothing() -> None:
    np.testing.assert_array_equal(scale_from(np.float32([0, 1, 5]), 0), np.ones(3))


def test_a_channel_without_activations_keeps_a_finite_scale() -> None:
    scale = scale_from(np.float32([0, 1, 5]), 1.0)
    assert np.isfinite(scale).all() and (scale > 0).all()


@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
def test_norm_times_weight_stays_what_it_was(zero_centred: bool, dtype: Any) -> None:
    weight, _, importance = layer()
    norm = np.random.default_rng(1).normal(0 if zero_centred else 1, 0.3, K).astype(dtype)
    new, scale = smooth_norm(norm, scale_from(importance, 0.5), zero_centred)
    assert new.dtype == norm.dtype and not np.array_equal(new, norm)
    offset = 1 if zero_centred else 0
    before = weight * (norm.astype(np.float64) + offset)
    after = smooth_columns(weight, scale) * (new.astype(np.float64) + offset)
    # the scale is the one of the rounded norm: coarse norms lose nothing
    np.testing.assert_allclose(after, before, rtol=1e-6)


finite = st.floats(-4, 4, width=32)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(finite, min_size=1, max_size=8), st.floats(2**-10, 2**10), st.booleans())
def test_any_norm_and_any_scale_keep_the_product(values: list[float], factor: float, zero_centred: bool) -> None:
    norm = np.asarray(values, dtype=BF16)
    new, scale = smooth_norm(norm, np.full(len(values), factor, np.float32), zero_centred)
    offset = 1 if zero_centred else 0
    assert np.isfinite(scale).all() and (scale != 0).all() and np.isfinite(new.astype(np.float32)).all()
    before = norm.astype(np.float64) + offset
    np.testing.assert_allclose((new.astype(np.float64) + offset) * scale, before, rtol=1e-6)


def test_a_gain_near_zero_does_not_become_zero() -> None:
    new, scale = smooth_norm(np.asarray([-0.99, 0.5], dtype=BF16), np.float32([1000, 1000]), True)
    assert (new.astype(np.float32) > -1).all()
    np.testing.assert_allclose((new.astype(np.float64) + 1) * scale, [1 - 0.98828125, 1.5], rtol=1e-6)


def test_a_channel_with_zero_gain_stays() -> None:
    new, scale = smooth_norm(np.asarray([0, 1], dtype=BF16), np.float32([4, 4]), False)
    np.testing.assert_array_equal(new.astype(np.float32), [0, 0.25])
    np.testing.assert_array_equal(scale, [1, 4])


def test_folding_reduces_the_error_of_the_output_on_inputs_it_has_not_seen() -> None:
    weight, _, importance = layer()
    norm = np.ones(K, np.float32)
    choice = choose_scale([consumer(weight, importance, search="absmax")], norm)
    assert 0 < choice.alpha <= 0.8 and choice.loss < 0.9 * choice.unfolded and choice.norm is not None
    fresh = np.random.default_rng(9).normal(size=(256, K)) * np.sqrt(importance)
    plain = encode(weight, "int4_g128", "absmax").decode()
    folded = encode(smooth_columns(weight, np.asarray(choice.scale)), "int4_g128", "absmax").decode()
    exact = fresh @ weight.T
    before = np.square(fresh @ plain.T - exact).sum()
    after = np.square((fresh * choice.norm) @ folded.T - exact).sum()
    assert after < 0.9 * before


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4", "int4_g32", "mixfp4"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_chosen_exponent_has_the_least_loss_and_none_is_a_candidate(fmt: str, weighted: bool) -> None:
    weight, _, importance = layer(3)
    choice = choose_scale([consumer(weight, importance, fmt, weighted=weighted)], np.ones(K, BF16), alphas=(0.25, 0.5))
    assert set(choice.losses) == {0.0, 0.25, 0.5} and choice.loss == min(choice.losses.values())


def test_equal_importance_folds_nothing() -> None:
    weight, _, _ = layer()
    choice = choose_scale([consumer(weight, np.ones(K, np.float32))], np.ones(K, np.float32))
    assert choice.alpha == 0 and choice.scale is None and choice.norm is None


def test_without_importance_nothing_is_folded() -> None:
    weight, _, _ = layer()
    assert choose_scale([consumer(weight, None)], np.ones(K, np.float32)).scale is None


def test_a_group_that_is_kept_as_a_whole_is_not_folded() -> None:
    weight, _, importance = layer()
    assert choose_scale([consumer(weight, importance, None)], np.ones(K, np.float32)).scale is None


def test_the_rounding_of_kept_matrices_is_reported() -> None:
    weight, _, importance = layer()
    kept = Consumer("router", weight[:4].astype(BF16), importance, None)
    choice = choose_scale([consumer(weight, importance, search="absmax"), kept], np.ones(K, BF16), alphas=(0.1,))
    assert choice.alpha == 0.1 and 0 < choice.rounding["router"] < 1e-5


def test_matrices_that_share_a_tensor_scale_are_judged_with_it() -> None:
    weight, _, importance = layer()
    both = [consumer(w, importance, "nvfp4") for w in (weight, weight * 2**17)]
    alone = choose_scale(both, np.ones(K, np.float32), alphas=(0.0,)).unfolded
    for one in both:
        one.share = "qkv"
    assert choose_scale(both, np.ones(K, np.float32), alphas=(0.0,)).unfolded > alone


def test_experts_count_by_their_tokens_and_share_the_norms_scale() -> None:
    weight, _, importance = layer()
    stack, seen = np.stack([weight, weight[::-1]]), np.stack([importance, importance[::-1]])
    lone = consumer(stack, seen, counts=np.asarray([100, 0]), search="absmax")
    choice = choose_scale([lone], np.ones(K, np.float32))
    one = choose_scale([consumer(weight, importance, search="absmax")], np.ones(K, np.float32))
    assert choice.alpha == one.alpha and choice.scale is not None and choice.scale.shape == (K,)
    np.testing.assert_array_equal(choice.scale, one.scale)


def test_the_rows_of_up_have_a_scale_for_every_expert() -> None:
    weight, _, importance = layer()
    stack, seen = np.stack([weight, weight]), np.stack([importance, importance[::-1]])
    choice = choose_scale([consumer(stack, seen, search="absmax")], per_expert=True)
    assert choice.scale is not None and choice.scale.shape == (2, K)
    np.testing.assert_allclose(choice.scale[0], choice.scale[1][::-1])


def test_some_of_the_experts_choose_for_all() -> None:
    weight, _, importance = layer()
    seen = np.stack([importance, importance[::-1], importance])
    some = consumer(weight[None], seen[1:2], search="absmax", experts=np.asarray([1]))
    choice = choose_scale([some], per_expert=True, importance=seen)
    assert choice.scale is not None and choice.scale.shape == (3, K) and choice.loss < choice.unfolded
    np.testing.assert_array_equal(choice.scale[1], choice.scale[0][::-1])


def test_up_times_down_stays_what_it_was() -> None:
    rng = np.random.default_rng(4)
    gate_up, down = rng.normal(size=(3, 16, 6)).astype(np.float32), rng.normal(size=(3, 6, 8)).astype(np.float32)
    scale = np.exp2(rng.uniform(-3, 3, (3, 8))).astype(np.float32)
    rows = np.concatenate([np.ones((3, 8), np.float32), scale], axis=1)
    new_up, new_down = Smoothing(rows=rows).apply(gate_up), Smoothing(columns=scale).apply(down)
    x = rng.normal(size=(3, 5, 6))

    def mlp(first: Any, second: Any) -> Any:
        hidden = x @ np.swapaxes(first, -1, -2)
        return (np.tanh(hidden[..., :8]) * hidden[..., 8:]) @ np.swapaxes(second, -1, -2)

    np.testing.assert_array_equal(new_up[:, :8], gate_up[:, :8])
    np.testing.assert_allclose(mlp(new_up, new_down), mlp(gate_up, down), rtol=1e-4, atol=1e-5)


def test_a_matrix_can_be_scaled_on_both_sides() -> None:
    up, bias = np.ones((4, 3), np.float32), np.ones(4, np.float32)
    smoothing = Smoothing(columns=np.float32([2, 2, 2]), rows=np.float32([4] * 4))
    assert (smoothing.apply(up) == 0.5).all() and (Smoothing(rows=smoothing.rows).apply(bias) == 0.25).all()


def test_the_weighted_error_is_the_outputs_error_for_independent_inputs() -> None:
    weight, _, importance = layer()
    signs = np.sign(np.random.default_rng(2).normal(size=(4096, K)))
    error = np.random.default_rng(3).normal(size=weight.shape).astype(np.float32)
    measured = np.square((signs * np.sqrt(importance)) @ error.T).mean(0).sum()
    assert weighted_error(weight, weight + error, importance) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("importance", "counts"), [(np.ones(3, np.float32), None), (np.ones(K, np.float32), np.asarray([1, 2]))]
)
def test_shapes_that_do_not_fit_are_refused(importance: Any, counts: Any) -> None:
    with pytest.raises(FormatError, match="w has shape"):
        choose_scale([consumer(layer()[0], importance, counts=counts)], np.ones(K, np.float32))
