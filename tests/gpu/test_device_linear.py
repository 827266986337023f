"""Products with packed weights in Triton's interpreter, against decoded weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.gpu.weights import FORMATS, weight

from halfbyte.errors import HalfbyteError
from halfbyte.gpu.device_linear import BUCKETS, DECODE_ABOVE, DeviceLinear, bucket_of, splits_of
from halfbyte.gpu.table_layout import describe_tables
from halfbyte.kernels.linear import NoKernelError


def activations(rows: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)


def difference(tensor: Any, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    wanted = x.double().numpy() @ tensor.decode().astype(np.float64).T
    if bias is not None:
        wanted = wanted + bias.double().numpy()
    return float(np.abs(y.double().numpy() - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_multiplied_exactly_in_fp32(name: str) -> None:
    tensor, x = weight(name, (40, 256)), activations(3, 256)
    assert difference(tensor, x, DeviceLinear(tensor, device="cpu")(x)) < 1e-6


@pytest.mark.parametrize("name", [n for n in FORMATS if n in ("mixfp4", "nvfp4", "razer", "if4", "q4_0")])
def test_fp16_activations_are_multiplied_with_fp16_weights(name: str) -> None:
    tensor, x = weight(name, (40, 256)), activations(3, 256, torch.float16)
    product = DeviceLinear(tensor, device="cpu")
    tensor.global_scale = None if tensor.global_scale is None else np.float32(1e-3)
    product.weight.factors.fill_(1.0 if tensor.global_scale is None else 1e-3)
    assert difference(tensor, x, product(x)) < 2e-3


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 5, 16), (8, 65, 208), (17, 33, 128), (40, 16, 1040)])
def test_ragged_shapes(rows: int, n: int, k: int) -> None:
    tensor, x, bias = weight("mixfp4", (n, k)), activations(rows, k), torch.linspace(-1, 1, n)
    assert difference(tensor, x, DeviceLinear(tensor, bias, device="cpu")(x), bias) < 1e-6


def test_a_long_sum_is_split_and_added_in_order() -> None:
    tensor, x = weight("mixfp4", (16, 128 * 16)), activations(2, 128 * 16)
    product = DeviceLinear(tensor, device="cpu")
    assert splits_of(1, 1, 16) == 4
    first, second = product(x), product(x)
    assert difference(tensor, x, first) < 1e-6
    assert torch.equal(first, second) and not product.counters.any()


def test_the_rows_of_a_batch_do_not_change_each_other() -> None:
    tensor, x = weight("mixfp4", (32, 256)), activations(8, 256)
    product = DeviceLinear(tensor, device="cpu")
    whole = product(x)
    for row in range(8):
        assert torch.equal(product(x[row : row + 1])[0], whole[row])


def test_many_rows_take_the_decoded_weight() -> None:
    tensor, x = weight("mixfp4", (20, 144)), activations(DECODE_ABOVE + 1, 144)
    product = DeviceLinear(tensor, torch.ones(20), device="cpu")
    np.testing.assert_allclose(product.decoded(torch.float32).numpy(), tensor.decode(), rtol=3e-7)
    assert difference(tensor, x, product(x), torch.ones(20)) < 1e-6


def test_leading_dimensions_stay_and_no_rows_give_no_rows() -> None:
    product = DeviceLinear(weight("nvfp4", (24, 128)), device="cpu")
    assert product(activations(6, 128).reshape(2, 3, 128)).shape == (2, 3, 24)
    assert product(torch.empty(0, 128)).shape == (0, 24)


def test_a_launch_depends_on_the_number_of_rows_alone() -> None:
    assert [bucket_of(rows).tokens for rows in (1, 8, 9, 16, 17, 128)] == [8, 8, 16, 16, 32, 32]
    assert splits_of(128, 1, 32) == 8 and splits_of(2048, 1, 64) == 1 and splits_of(1, 1, 3) == 1
    assert all(bucket.strips * 16 != 64 or bucket.warps < 4 for bucket in BUCKETS)


def test_activations_of_another_width_are_refused() -> None:
    product = DeviceLinear(weight("nvfp4", (24, 128)), device="cpu")
    with pytest.raises(HalfbyteError, match="do not fit a weight with 128 columns"):
        product(torch.zeros(1, 127))
    with pytest.raises(NoKernelError, match=r"not torch\.float64"):
        product(torch.zeros(1, 128, dtype=torch.float64))
    with pytest.raises(NoKernelError, match="a linear layer needs a matrix"):
        DeviceLinear(weight("nvfp4", (2, 24, 128)), device="cpu")


def test_fp16_activations_need_scales_that_fit() -> None:
    assert describe_tables(weight("mxfp4", (16, 32)).format).scale == "e8m0"
    with pytest.raises(NoKernelError, match="use BF16 activations"):
        DeviceLinear(weight("mxfp4", (16, 32)), device="cpu")(torch.zeros(1, 32, dtype=torch.float16))
