"""Zeros, single values, extreme sizes and source types, for every format and search."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import pytest

from formats.cases import CASES, QUICK, TENSOR_SCALED, draw, reach, scale_values, shape_for, smallest_magnitude
from halfbyte.formats import AffineFormat, get_format
from halfbyte.search import encode

every_case = pytest.mark.parametrize(("name", "search"), CASES)
quick_case = pytest.mark.parametrize(("name", "search"), QUICK)


@every_case
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_tensor_of_zeros_decodes_to_zeros(name: str, search: str, zero: float) -> None:
    q = encode(np.full(shape_for(get_format(name)), zero, dtype=np.float32), name, search)
    assert not q.decode().any()
    assert np.isfinite(scale_values(q)).all()
    if q.global_scale is not None:
        assert q.global_scale == 1


@every_case
def test_a_zero_block_beside_others_decodes_to_zeros(name: str, search: str) -> None:
    fmt = get_format(name)
    columns = fmt.block[1] if fmt.block[1] > 0 else 64
    x = draw("normal", (max(fmt.block[0], 1) * 2, columns * 2), 0)
    x[: len(x) // 2, :columns] = 0
    if fmt.block[1] < 0:
        x[0] = 0
    q = encode(x, name, search)
    assert not q.decode()[0, :columns].any()


@quick_case
@pytest.mark.parametrize("value", [1.0, -1.0, 6.0, -3.5, 448.0, 0.0078])
def test_a_block_of_one_value_keeps_it(name: str, search: str, value: float) -> None:
    x = np.full(shape_for(get_format(name)), value, dtype=np.float32)
    # the OCP floor rule of MXFP4 clips up to a quarter
    assert np.abs(encode(x, name, search).decode() / value - 1).max() <= 0.25


@quick_case
@pytest.mark.parametrize("value", [3.0, -3.0])
def test_a_single_element_among_zeros_leaves_them_zero(name: str, search: str, value: float) -> None:
    x = np.zeros(shape_for(get_format(name)), dtype=np.float32)
    x[0, 5] = value
    decoded = encode(x, name, search).decode()
    assert abs(decoded[0, 5] / value - 1) <= 0.25
    rest = np.delete(decoded.reshape(-1), 5)
    fmt = get_format(name)
    # the smallest magnitude of IQ4_NL is 1 of 127; a BF16 bias is no whole number of BF16 steps
    near_zero = smallest_magnitude(fmt) > 0 or (isinstance(fmt, AffineFormat) and fmt.offset == "bias")
    assert np.abs(rest).max() <= (abs(value) / 100 if near_zero else 0)


@pytest.mark.slow
@quick_case
@pytest.mark.parametrize("size", [1e-40, 1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30, 3e38])
def test_any_size_stays_finite_and_no_worse_than_zeros(name: str, search: str, size: float) -> None:
    fmt = get_format(name)
    u = draw("uniform", shape_for(fmt, 4), 7)
    u /= np.abs(u).max()
    x = (u.astype(np.float64) * size).astype(np.float32)
    q = encode(x, name, search)
    decoded = q.decode().astype(np.float64)
    assert np.isfinite(decoded).all()
    error = np.linalg.norm((decoded - x) / size) / np.linalg.norm(x / np.float64(size))
    # a table without zero can do no better than its smallest value
    smallest = smallest_magnitude(fmt) and smallest_magnitude(fmt) * scale_values(q).max()
    assert error <= (1 if size > 1e-39 else 1.1) or np.abs(decoded).max() <= smallest < 1e-7
    low, high = reach(fmt)
    if low < size < high:
        # uniform weights on 4 levels: a step is a third of the range
        assert error < max(0.16, 1 / fmt.levels if isinstance(fmt, AffineFormat) else 0)


@quick_case
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30, 3e38])
def test_powers_of_two_as_tensor_scale_take_any_size(name: str, search: str, size: float) -> None:
    if name not in TENSOR_SCALED:
        return
    x = (draw("normal", (4, 64), 1) / 5 * np.float64(size)).astype(np.float32)
    q = encode(x, name, search, power_of_two=True)
    assert np.isfinite(q.decode()).all()
    assert np.frexp(q.global_scale)[0] == 0.5


@quick_case
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "float64"])
def test_the_type_of_the_source_does_not_matter(name: str, search: str, kind: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, kind, None) or kind)
    # eighths up to 4: exact in every type
    x = (np.random.RandomState(0).randint(-32, 33, shape_for(get_format(name))) / 8).astype(dtype)
    q, plain = encode(x, name, search), encode(x.astype(np.float32), name, search)
    assert np.array_equal(q.codes, plain.codes)
    assert np.array_equal(q.scales, plain.scales)


@pytest.mark.parametrize("name", TENSOR_SCALED)
def test_blocks_far_below_the_tensor_use_subnormal_scales_and_never_zero(name: str) -> None:
    shape = (1, 16 * 40)
    x = draw("normal", shape, 3) * np.repeat(2.0 ** -np.arange(40), 16).astype(np.float32)
    for search in ("absmax", "sweep"):
        q = encode(x, name, search)
        codes = q.scales & ((1 << get_format(name).scale.bits) - 1)  # type: ignore[attr-defined]
        assert codes.min() == 1
        assert codes.max() > 60


def test_a_tensor_of_subnormals_is_quantized_not_dropped() -> None:
    x = np.random.RandomState(0).randint(-(2**22), 2**22, (2, 64)).astype(np.float32) * np.float32(2.0**-149)
    assert np.abs(x).max() < np.finfo(np.float32).tiny
    decoded = encode(x, "nvfp4").decode()
    assert decoded.any() and np.isfinite(decoded).all()


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "int4_g32", "iq4_nl_g32"])
def test_errors_beyond_fp32_give_no_warning(name: str) -> None:
    x = np.full(shape_for(get_format(name)), 3e38, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(x, name, "sweep")
