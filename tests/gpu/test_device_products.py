"""Which formats have products on GPUs, and results side by side."""

from __future__ import annotations

import pytest
import torch
from tests.gpu.weights import weight

from halfbyte.errors import FormatError
from halfbyte.formats import get_format
from halfbyte.gpu.device_linear import DeviceLinear
from halfbyte.gpu.device_products import DeviceRows, available, has_product


def test_formats_with_one_or_two_codebooks_have_products() -> None:
    assert available()
    names = ("mixfp4", "if4", "razer", "nf4", "mxfp4", "int4_g128")
    assert all(has_product(get_format(name)) for name in names)
    assert not has_product(get_format("hif4")) and not has_product(get_format("fp8_channel"))


def test_scales_beyond_fp16_have_none_for_fp16() -> None:
    assert not has_product(get_format("mxfp4"), torch.float16) and has_product(get_format("mxfp4"), torch.float32)


def test_results_of_several_products_lie_side_by_side() -> None:
    first, second = (DeviceLinear(weight(name, (n, 128)), device="cpu") for name, n in (("mixfp4", 16), ("nf4", 5)))
    x, both = torch.ones(2, 128), DeviceRows([first, second])
    assert torch.equal(both.run_on_device(x), torch.cat([first(x), second(x)], dim=-1))
    assert (both.n, both.k) == (21, 128)


def test_products_of_other_widths_have_no_common_activations() -> None:
    products = [DeviceLinear(weight("mixfp4", (16, k)), device="cpu") for k in (16, 32)]
    with pytest.raises(FormatError, match="take no common activations"):
        DeviceRows(products)
