"""Which products vLLM's layers get on which device; vLLM itself is not needed."""

from __future__ import annotations

import numpy as np
import torch
from tests.gpu.weights import weight

from halfbyte.engines.vllm_device import (
    experts_product,
    has_mixture,
    keeps_packed_on,
    linear_product,
    mixture_on,
    multiplies,
    products_on,
)
from halfbyte.formats import get_format
from halfbyte.gpu.device_linear import DeviceLinear
from halfbyte.gpu.device_products import DeviceRows
from halfbyte.runtime.ops import run_experts, run_linear

CPU = torch.device("cpu")


def test_layers_keep_their_weights_on_cpus_and_cuda_devices() -> None:
    assert keeps_packed_on("cpu") and keeps_packed_on("cuda") and not keeps_packed_on("tpu")
    assert multiplies(get_format("mixfp4"), "cuda") and multiplies(get_format("hif4"), "cpu")
    assert not multiplies(get_format("hif4"), "cuda")


def test_fused_layers_are_one_product_where_they_can_be() -> None:
    q, k = weight("mixfp4", (16, 128), 1), weight("mixfp4", (32, 128), 2)
    k.global_scale = q.global_scale
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    expected = run_linear(x, linear_product([q, k], CPU))
    whole = products_on([q, k], CPU)
    assert isinstance(whole, DeviceLinear)
    torch.testing.assert_close(run_linear(x, whole), expected, rtol=1e-4, atol=1e-2)
    k.global_scale = np.asarray(np.float32(0.5))
    apart = products_on([q, k], CPU)
    assert isinstance(apart, DeviceRows) and run_linear(x, apart).shape == (2, 48)


def test_a_mixture_is_the_same_on_both() -> None:
    up, down = weight("mixfp4", (3, 64, 128), 1), weight("mixfp4", (3, 16, 32), 2)
    up.global_scale, down.global_scale = np.full(3, 1e-3, np.float32), np.full(3, 1e-3, np.float32)
    settings = {"activation": "silu", "gated": True, "gate_up_bias": np.ones((3, 64), np.float32)}
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    chosen, shares = torch.tensor([[0, 2], [1, -1]]), torch.tensor([[0.5, 0.25], [1.0, 1.0]])
    expected = run_experts(x, chosen, shares, experts_product(up, down, CPU, **settings))
    found = run_experts(x, chosen, shares, mixture_on(up, down, CPU, **settings))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_experts_that_have_no_product_on_a_gpu() -> None:
    assert has_mixture("silu", True, 48, "cuda") and has_mixture("relu2", False, 40, "cpu")
    assert not has_mixture("relu2", False, 48, "cuda") and not has_mixture("silu", True, 40, "cuda")
