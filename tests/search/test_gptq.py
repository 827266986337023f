from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from halfbyte.errors import FormatError
from halfbyte.formats import QuantizedTensor, get_format, list_formats
from halfbyte.formats.packing import unpack_codes
from halfbyte.kernels import ErrorStats, backends, use_backend
from halfbyte.search import encode
from halfbyte.search.gptq import gptq, prepare, problem
from halfbyte.search.hessian import checked, damped
from search.hessians import hessian, output_error, weight

MODES = ("in_loop", "local_hessian", "compensated", "static")
FORMATS = (
    "nvfp4",
    "mixfp4",
    "if4",
    "iq4_nl",
    "mxfp4",
    "int4_g16",
    "int4_g32",
    "int4_g128",
    "int4_asym_g32",
    "affine4_g64",
)


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    pairs = [(getattr(a, n), getattr(b, n)) for n in ("codes", "scales", "global_scale", "offsets")]
    return all((x is None and y is None) or x.tobytes() == y.tobytes() for x, y in pairs)


def textbook(w: np.ndarray, scales: np.ndarray, values: np.ndarray, h: np.ndarray) -> np.ndarray:
    """GPTQ as its paper writes it, in FP64: given scales [N, K] and the values of a table."""
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    left, result = w.astype(np.float64).copy(), np.zeros(w.shape)
    for j in range(w.shape[1]):
        nearest = np.abs(left[:, j, None] / scales[:, j, None] - values).argmin(axis=1)
        result[:, j] = values[nearest] * scales[:, j]
        error = (left[:, j] - result[:, j]) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
    return result


def test_static_gptq_is_that_of_the_paper() -> None:
    w, h = weight(24, 128), hessian(128)
    found = gptq(w, "nvfp4", "absmax", h, mode="static")
    plain = encode(w, "nvfp4", "absmax")
    assert found.scales.tobytes() == plain.scales.tobytes()
    scales = np.repeat(plain.scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64), 16, axis=1)
    values = np.unique(get_format("nvfp4").codebooks[0].array.astype(np.float64))
    expected = textbook(w, scales * float(plain.global_scale), values, damped(checked(h, 128), 0.01))
    assert np.isclose(found.decode(), expected, rtol=1e-5, atol=1e-9).mean() > 0.999


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", ["mixfp4", "mixfp4_makora", "mixfp4_paper", "iq4_nl", "razer"])
def test_a_block_of_zeros_has_neither_scale_nor_selector_bit(name: str, backend: str) -> None:
    w = weight(4, 64)
    w[1, 16:32] = 0
    with use_backend(backend):
        found = gptq(w, name, "sweep", np.eye(64))
    assert found.scales[1, 1] == 0 and not found.codebooks[1, 1]
    assert not found.decode()[1, 16:32].any() and found.scales[1, [0, 2, 3]].all()


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("stored", [0, 0x80])
def test_a_given_scale_of_zero_makes_zeros_whatever_its_selector_bit(stored: int, backend: str) -> None:
    w = weight(4, 64)
    given = encode(w, "mixfp4")
    given.scales[1, 1] = stored
    with use_backend(backend):
        found = gptq(w, "mixfp4", "absmax", np.eye(64), mode="static", given=given)
    assert not found.codes[1, 8:16].any() and found.codes[1, 16:24].any()


@pytest.mark.parametrize("name", FORMATS)
def test_feedback_lowers_the_output_error_of_every_format(name: str) -> None:
    w, h, fresh = weight(48, 256), hessian(256), hessian(256, 4096)
    plain = output_error(w, encode(w, name, "sweep").decode(), fresh)
    for mode in MODES:
        assert output_error(w, gptq(w, name, "sweep", h, mode=mode).decode(), fresh) < 0.75 * plain, mode


@pytest.mark.parametrize("name", ["nvfp4", "mixfp4", "iq4_nl", "int4_g32"])
def test_choosing_scales_in_the_loop_beats_choosing_them_before(name: str) -> None:
    w, h, fresh = weight(128, 256), hessian(256), hessian(256, 8192)
    error = {mode: output_error(w, gptq(w, name, "sweep", h, mode=mode).decode(), fresh) for mode in MODES}
    assert error["in_loop"] < 0.93 * min(error["static"], error["compensated"])


def test_columns_in_the_order_of_their_activations_help_static_scales() -> None:
    w, h = weight(64, 256), hessian(256)
    error = {
        o: output_error(w, gptq(w, "nvfp4", "sweep", h, mode="static", order=o).decode(), h) for o in ("none", "act")
    }
    assert error["act"] < error["none"]


@pytest.mark.parametrize("mode", MODES)
def test_every_order_gives_scales_and_codes_their_own_places(mode) -> None:
    w, h = weight(4, 128), np.diag(np.random.RandomState(1).permutation(128) + 1.0)
    w[:, :16] *= 30
    found = gptq(w, "mixfp4", "sweep", h, mode=mode, order="act")
    # without correlations the order changes nothing but the rounding of losses
    plain = gptq(w, "mixfp4", "sweep", h, mode=mode)
    assert (found.decode() == plain.decode()).mean() > 0.97


@pytest.mark.parametrize("mode", ["static", "compensated"])
@pytest.mark.parametrize("name", FORMATS)
def test_inputs_without_correlations_leave_nothing_to_feed_back(name: str, mode) -> None:
    w = weight(6, 256)
    found, plain = gptq(w, name, "sweep", np.eye(256), mode=mode), encode(w, name, "sweep")
    errors = [np.square(t.decode().astype(np.float64) - w).sum() for t in (found, plain)]
    # equal losses may be rounded differently
    assert same(found, plain) or np.isclose(*errors, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mixfp4", "int4_asym_g32"])
def test_slices_of_rows_give_the_bytes_of_the_whole(name: str, mode) -> None:
    w, prepared = weight(41, 256), prepare(hessian(256), name, mode=mode)
    amax = {"amax": np.abs(w).max()} if name == "mixfp4" else {}
    whole = gptq(w, name, "sweep", prepared)
    for start, stop in ((0, 1), (1, 18), (18, 41)):
        part = gptq(w[start:stop], name, "sweep", prepared, **amax)
        assert part.codes.tobytes() == whole.codes[start:stop].tobytes()
        assert part.scales.tobytes() == whole.scales[start:stop].tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ["none", "act"])
def test_experts_with_hessians_of_their_own_are_rounded_one_by_one(mode, order) -> None:
    w, h = weight(2, 2, 5, 64), np.stack([hessian(64, seed=s) for s in range(4)]).reshape(2, 2, 64, 64)
    whole = gptq(w, "mixfp4", "sweep", h, mode=mode, order=order)
    for i in range(2):
        for j in range(2):
            one = gptq(w[i, j], "mixfp4", "sweep", h[i, j], mode=mode, order=order)
            assert one.codes.tobytes() == whole.codes[i, j].tobytes()
            assert one.scales.tobytes() == whole.scales[i, j].tobytes()


def test_experts_may_share_a_hessian() -> None:
    w, h = weight(3, 5, 64), hessian(64)
    whole = gptq(w, "nvfp4", "sweep", h)
    assert whole.codes[1].tobytes() == gptq(w[1], "nvfp4", "sweep", h).codes.tobytes()


def test_given_scales_are_kept() -> None:
    w, h = weight(8, 128), hessian(128)
    given = encode(w, "mixfp4", "sweep", np.diag(h), power_of_two=True)
    found = gptq(w, "mixfp4", "sweep", h, mode="static", given=given)
    assert found.scales.tobytes() == given.scales.tobytes()
    assert found.global_scale == given.global_scale and found.codes.tobytes() != given.codes.tobytes()


def test_weights_of_zero_stay_zero() -> None:
    w = weight(4, 64)
    w[1] = 0
    w[:, 32:48] = 0
    for name in ("mixfp4", "mxfp4", "int4_g16", "int4_asym_g32"):
        for mode in MODES:
            found = gptq(w, name, "sweep", np.eye(64), mode=mode)
            assert not found.decode()[1].any() and not found.decode()[:, 32:48].any()


@pytest.mark.parametrize("mode", MODES)
def test_a_block_of_zeros_may_take_the_errors_of_its_neighbours(mode) -> None:
    w, h = weight(16, 64), hessian(64)
    w[:, 32:48] = 0
    found = gptq(w, "nvfp4", "sweep", h, mode=mode).decode()
    assert np.isfinite(found).all() and (found[:, 32:48].any() == (mode != "static"))


def test_columns_that_no_input_reached_are_rounded_to_nearest() -> None:
    w, h = weight(8, 64), hessian(64)
    h[10], h[:, 10] = 0, 0
    found = gptq(w, "nvfp4", "sweep", h, mode="static")
    assert np.array_equal(found.decode()[:, 10], encode(w, "nvfp4", "sweep").decode()[:, 10])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_weights_of_every_type_are_their_fp32_values(dtype) -> None:
    w, h = weight(19, 96).astype(dtype), hessian(96)
    assert same(gptq(w, "mixfp4", "sweep", h), gptq(w.astype(np.float32), "mixfp4", "sweep", h))


def test_tensor_scales_are_those_of_encode() -> None:
    w, h = weight(3, 4, 64), hessian(64)
    for options in ({}, {"amax": 1.0}, {"global_scale": 0.01}, {"global_scale_inv": 100.0}, {"power_of_two": True}):
        for mode in ("in_loop", "static"):
            found, plain = gptq(w, "nvfp4", "sweep", h, mode=mode, **options), encode(w, "nvfp4", "sweep", **options)
            assert found.global_scale.tobytes() == plain.global_scale.tobytes()
            assert (found.global_scale_inv is None) == (plain.global_scale_inv is None)


def test_statistics_are_those_of_the_result() -> None:
    w, h, stats = weight(8, 64), hessian(64), ErrorStats()
    found = gptq(w, "mixfp4", "sweep", h, stats=stats)
    assert stats.elements == w.size and sum(stats.codebook_blocks) == w.size // 16
    assert np.isclose(stats.squared_error, np.square(found.decode().astype(np.float64) - w).sum())


def test_a_single_row_is_rounded() -> None:
    w, h = weight(64), hessian(64)
    found = gptq(w, "nvfp4", "sweep", h)
    assert found.shape == (64,) and found.codes.tobytes() == gptq(w[None], "nvfp4", "sweep", h).codes.tobytes()


def test_four_over_six_chooses_between_its_two_scales() -> None:
    w, h = weight(16, 128), hessian(128)
    absmax = {"global_scale": encode(w, "nvfp4", "four_over_six").global_scale}
    six = gptq(w, "nvfp4", "absmax", h, mode="compensated", **absmax)
    found = gptq(w, "nvfp4", "four_over_six", h)
    assert 0.1 < (six.scales == found.scales).mean() < 0.9


def test_codes_that_a_format_never_writes_stay_unused() -> None:
    w, h = weight(64, 128), hessian(128)
    found = gptq(w, "mixfp4_twos_complement", "sweep", h)
    codes = unpack_codes(found.codes, 4).reshape(64, 8, 16)
    assert (
        found.codebooks.any()
        and (codes[found.codebooks == 0] == 8).any()
        and not (codes[found.codebooks == 1] == 8).any()
    )


@pytest.mark.parametrize("name", list_formats())
def test_formats_say_whether_gptq_applies(name: str) -> None:
    fmt = get_format(name)
    if problem(fmt) is None:
        k = fmt.block[1] * 2
        assert np.isfinite(gptq(weight(3, k), fmt, "absmax", hessian(k)).decode()).all()
    else:
        with pytest.raises(FormatError, match="GPTQ does not apply"):
            prepare(hessian(256), fmt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": np.eye(32)}, "shape \\[32, 32\\], but the weight \\[4, 64\\]"),
        ({"hessian": np.full((64, 64), np.nan)}, "NaN"),
        ({"search": "swep"}, "did you mean sweep"),
        ({"mode": "late"}, "unknown mode 'late'"),
        ({"order": "up"}, "unknown order 'up'"),
        ({"damping": -1}, "damping is -1"),
        ({"weight": np.full((4, 64), np.inf, dtype=np.float32)}, "NaN or infinity, first at index \\[0, 0\\]"),
        ({"weight": np.full((4, 64), 1e35, dtype=np.float32)}, "GPTQ needs magnitudes up to"),
        ({"weight": np.ones((4, 64), dtype=np.int32)}, "cannot quantize values of type int32"),
        ({"given": encode(weight(4, 64), "nvfp4")}, "use mode 'static'"),
        ({"given": encode(weight(4, 64), "nvint4"), "mode": "static"}, "given scales are of nvint4"),
        ({"hessian": prepare(np.eye(64), "mixfp4")}, "prepared for mixfp4"),
        ({"hessian": [prepare(np.eye(64), "nvfp4")] * 3}, "3 Hessians do not fit"),
    ],
)
def test_bad_arguments_are_refused(change: dict, message: str) -> None:
    arguments = {"weight": weight(4, 64), "format": "nvfp4", "search": "sweep", "hessian": np.eye(64)} | change
    with pytest.raises(FormatError, match=message):
        gptq(**arguments)
