from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from halfbyte.errors import FormatError
from halfbyte.formats import get_format
from halfbyte.kernels import linear, linear_runtime, use_backend
from halfbyte.kernels.linear import NoKernelError, PackedDense, PackedLinear
from halfbyte.search import encode
from kernels.linear_cases import (
    FP32_ONLY,
    ISAS,
    PRODUCT_FORMATS,
    activations,
    as_bf16,
    columns,
    expected,
    miss,
    rounded_to_int8,
    weight,
)

BATCHES = (1, 3, 4, 8, 33)
EXACT, INT8, INT8_SUMS = 1e-6, 8e-3, 2e-6


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    with linear.use_isa(request.param):
        yield request.param


def rows_of(name: str) -> int:
    return 150 if name == "fp8_block128" else 37


@pytest.mark.parametrize("name", PRODUCT_FORMATS)
def test_exact_products_are_those_of_the_decoded_weight(name: str, isa: str) -> None:
    for blocks in (1, 5):
        tensor = weight(name, (rows_of(name), columns(name, blocks)))
        packed = PackedLinear(tensor)
        for batch in BATCHES:
            x = activations(batch, packed.k)
            assert miss(packed(x), expected(x, tensor)) <= EXACT


@pytest.mark.parametrize("name", [n for n in PRODUCT_FORMATS if n not in FP32_ONLY])
def test_int8_products_are_those_of_rounded_activations(name: str, isa: str) -> None:
    tensor = weight(name, (rows_of(name), columns(name, 5)))
    packed = PackedLinear(tensor)
    plain = weight(name, tensor.shape)
    if plain.format.name.endswith(("hadamard", "duquant")):
        plain.format = plain.format.plain
    for batch in BATCHES:
        x = activations(batch, packed.k)
        turned = x.copy()
        if plain.format is not tensor.format:
            tensor.format.rotate_in_place(turned, tensor.rotation)
        assert miss(packed(x, "int8"), expected(rounded_to_int8(turned), plain)) <= INT8_SUMS


@pytest.mark.parametrize("name", PRODUCT_FORMATS)
def test_int8_rounding_costs_less_than_a_percent(name: str) -> None:
    k = max(512, columns(name, 4))
    tensor = weight(name, (256, k - k % max(1, get_format(name).block[1])))
    x = activations(4, tensor.shape[1])
    wanted = expected(x, tensor)
    y = PackedLinear(tensor)(x, "int8")
    assert np.sqrt(np.mean([miss(y[t : t + 1], wanted[t : t + 1]) ** 2 for t in range(4)])) <= INT8


@pytest.mark.parametrize("name", FP32_ONLY)
def test_formats_without_integers_are_exact_in_int8_mode_too(name: str) -> None:
    tensor = weight(name, (40, columns(name, 3)))
    packed, x = PackedLinear(tensor), activations(5, tensor.shape[1])
    assert packed(x, "int8").tobytes() == packed(x).tobytes()


@pytest.mark.parametrize("selector", ["zero", "one", "mixed"])
@pytest.mark.parametrize("name", ["mixfp4", "mixfp4_makora", "mixfp4_twos_complement", "if4", "razer", "razer_e3m3"])
def test_selectors_choose_the_codebook_of_their_rows_and_columns(name: str, selector: str, isa: str) -> None:
    tensor = weight(name, (48, 96), selector=selector)
    packed = PackedLinear(tensor)
    for batch in (1, 6):
        x = activations(batch, 96)
        assert miss(packed(x), expected(x, tensor)) <= EXACT
        assert miss(packed(x, "int8"), expected(rounded_to_int8(x), tensor)) <= INT8_SUMS


@pytest.mark.parametrize("shape", [(1, 16), (15, 48), (16, 32), (17, 80), (33, 1040)])
def test_ragged_shapes(shape: tuple[int, int], isa: str) -> None:
    tensor = weight("mixfp4", shape)
    packed = PackedLinear(tensor)
    for batch in (1, 5):
        x = activations(batch, shape[1])
        assert miss(packed(x), expected(x, tensor)) <= EXACT
        assert miss(packed(x, "int8"), expected(rounded_to_int8(x), tensor)) <= INT8_SUMS


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_activations_and_results(dtype: type, isa: str) -> None:
    tensor = weight("nvfp4", (40, 160))
    bias = np.linspace(-1, 1, 40, dtype=np.float32)
    packed = PackedLinear(tensor, bias)
    x = activations(3, 160, dtype=dtype) * dtype(0.1)
    wanted = packed(x.astype(np.float32))
    assert miss(packed(x), wanted.astype(np.float64)) <= EXACT
    assert packed(x, dtype=dtype).tobytes() == packed(x).astype(dtype).tobytes()


def test_activations_as_bits_of_bf16_are_bf16(isa: str) -> None:
    packed = PackedLinear(weight("mixfp4", (16, 64)))
    x = as_bf16(activations(2, 64))
    assert packed(x.view(np.uint16)).tobytes() == packed(x).tobytes()


def test_the_bias_and_the_global_scale_are_applied(isa: str) -> None:
    x = activations(2, 64)
    for inverse in (False, True):
        tensor = weight("nvfp4", (20, 64))
        if inverse:
            tensor.global_scale, tensor.global_scale_inv = None, np.float32(3) * tensor.global_scale
        bias = np.arange(20, dtype=np.float32)
        assert miss(PackedLinear(tensor, bias)(x), expected(x, tensor, bias)) <= EXACT


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "q4_0"])
def test_a_nan_scale_reaches_its_row_alone(name: str, isa: str) -> None:
    tensor = weight(name, (20, 128))
    nan = {"nvfp4": 0x7F, "mxfp4": 0xFF, "q4_0": np.float16(np.nan)}[name]
    tensor.scales[7, 1] = nan
    for mode in ("exact", "int8"):
        for batch in (1, 9):
            y = PackedLinear(tensor)(activations(batch, 128), mode)
            assert np.isnan(y[:, 7]).all() and np.isfinite(np.delete(y, 7, axis=1)).all()


def test_activations_that_are_no_numbers_reach_their_rows_alone(isa: str) -> None:
    packed = PackedLinear(weight("mixfp4", (20, 128)))
    x = activations(4, 128)
    x[1, 5], x[3, 100] = np.nan, np.inf
    for mode in ("exact", "int8"):
        y = packed(x, mode)
        assert not np.isfinite(y[[1, 3]]).any() and np.isfinite(y[[0, 2]]).all()


def test_flagged_scales_of_formats_with_one_codebook_are_negative(isa: str) -> None:
    tensor = weight("nvfp4", (20, 64))
    tensor.scales[3:9] |= 0x80
    x = activations(3, 64)
    assert miss(PackedLinear(tensor)(x), expected(x, tensor)) <= EXACT


def test_subnormal_codes_and_scales_of_fp8(isa: str) -> None:
    tensor = weight("fp8_channel", (16, 256))
    tensor.codes[:] = np.arange(256, dtype=np.uint8) & 0x87
    small = weight("nvfp4", (16, 64))
    small.scales[:] = np.arange(16, dtype=np.uint8)[:, None] % 9
    for case in (tensor, small):
        x = activations(2, case.shape[1])
        assert miss(PackedLinear(case)(x), expected(x, case)) <= EXACT


def test_encoded_weights_give_what_their_decoded_values_give() -> None:
    w = activations(64, 256, seed=4) * np.float32(0.02)
    x = activations(4, 256)
    for name in ("mixfp4", "int4_g128", "hif4", "affine4_g64", "mxfp4_duquant"):
        tensor = encode(w, name, "absmax")
        assert miss(PackedLinear(tensor)(x), expected(x, tensor)) <= EXACT


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("k", [1, 31, 64, 333])
def test_dense_products(dtype: type, k: int, isa: str) -> None:
    w = (activations(19, k, seed=2) * np.float32(0.1)).astype(dtype)
    bias = np.arange(19, dtype=np.float32)
    packed = PackedDense(w, bias)
    for batch in (1, 3, 8, 33):
        x = activations(batch, k)
        assert miss(packed(x), x.astype(np.float64) @ w.astype(np.float64).T + bias) <= EXACT
        narrow = as_bf16(x)
        assert miss(packed(narrow), narrow.astype(np.float64) @ w.astype(np.float64).T + bias) <= EXACT


def test_dense_products_read_rows_of_a_larger_matrix(isa: str) -> None:
    wide = activations(12, 80, seed=3)
    packed = PackedDense(wide[2:9, 8:72])
    x = activations(2, 64)
    assert miss(packed(x), x.astype(np.float64) @ wide[2:9, 8:72].astype(np.float64).T) <= EXACT


def test_auto_is_exact_for_few_rows_where_the_processor_multiplies_bf16(isa: str) -> None:
    packed, wide = PackedLinear(weight("mixfp4", (40, 96))), activations(9, 96)
    few, many = as_bf16(wide[:8]), as_bf16(wide)
    assert packed(few, "int8").tobytes() != packed(few, "exact").tobytes()
    assert packed(few, "auto").tobytes() == packed(few, "exact" if isa == "avx512bf16" else "int8").tobytes()
    assert packed(wide[:8], "auto").tobytes() == packed(wide[:8], "int8").tobytes()
    assert packed(many, "auto").tobytes() == packed(many, "int8").tobytes() != packed(many, "exact").tobytes()


def test_what_has_no_kernel_says_so() -> None:
    with pytest.raises(NoKernelError, match="affine3_g64"):
        PackedLinear(weight("affine3_g64", (16, 64)))
    with pytest.raises(NoKernelError, match="matrix"):
        PackedLinear(weight("nvfp4", (2, 16, 64)))
    with use_backend("reference"), pytest.raises(NoKernelError, match="decoded"):
        PackedLinear(weight("nvfp4", (16, 64)))
    with pytest.raises(NoKernelError, match="int32"):
        PackedDense(np.zeros((4, 4), dtype=np.int32))


def test_bad_input_is_refused_with_a_sentence() -> None:
    packed = PackedLinear(weight("nvfp4", (16, 64)))
    with pytest.raises(FormatError, match="64 columns"):
        packed(np.zeros((2, 32), dtype=np.float32))
    with pytest.raises(FormatError, match="float64"):
        packed(np.zeros((2, 64)))
    with pytest.raises(FormatError, match="unknown mode"):
        packed(np.zeros((2, 64), dtype=np.float32), "int4")
    with pytest.raises(FormatError, match="bias"):
        PackedLinear(weight("nvfp4", (16, 64)), np.zeros(15))
    broken = weight("nvfp4", (16, 64))
    broken.scales = broken.scales[:, :2]
    with pytest.raises(FormatError, match="scales"):
        PackedLinear(broken)


def test_no_rows_give_no_results() -> None:
    assert PackedLinear(weight("nvfp4", (16, 64)))(np.zeros((0, 64), dtype=np.float32)).shape == (0, 16)


def test_a_processor_without_vector_instructions_says_once_that_it_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    linear_runtime._say_slow.cache_clear()
    tensor, x = weight("nvfp4", (16, 64)), activations(2, 64)
    with use_backend("baseline"):
        if linear.isa() != "baseline":
            pytest.skip("the baseline's backend has dot products here")
        for _ in range(2):
            assert miss(PackedLinear(tensor)(x), expected(x, tensor)) <= EXACT
    assert [record.getMessage().count("slower") for record in caplog.records] == [1]
