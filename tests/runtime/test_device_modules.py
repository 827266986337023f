"""Packed modules whose products run by the kernels for GPUs, here in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.runtime import load
from halfbyte.runtime.device_modules import DeviceMatrix, DeviceStack, device_of, place_module, return_module
from halfbyte.runtime.packed_modules import PackedWeights
from small_models import linear

Saved = Callable[[str], Path]
Quantized = Callable[..., Path]
IDS = torch.tensor([[5, 6, 7, 8, 9]])
HERE = torch.device("cpu")


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PackedWeights)]


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_a_model_gives_the_same_logits_there_and_back(saved: Saved, quantized: Quantized, architecture: str) -> None:
    model = load(quantized(saved(architecture), linear("mixfp4", if_not_divisible="keep")), dtype=torch.float32)
    expected, held = logits(model), modules(model)
    bytes_of_file = {id(m): {n: p.tensor().codes.tobytes() for n, p in m._packed.items()} for m in held}
    assert held and all(place_module(module, HERE, torch.float32) for module in held)
    assert all(isinstance(p, DeviceMatrix | DeviceStack) for m in held for p in m._packed.values())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert {device_of(module) for module in held} == {HERE}
    for module in held:
        assert {n: p.tensor().codes.tobytes() for n, p in module._packed.items()} == bytes_of_file[id(module)]
        return_module(module)
    assert not any(device_of(module) for module in held)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_format_without_a_product_stays_where_it_is(saved: Saved, quantized: Quantized) -> None:
    model = load(quantized(saved("qwen3"), linear("int4_g32", if_not_divisible="keep")), dtype=torch.float32)
    module = modules(model)[0]
    assert not place_module(module, HERE, torch.float16) and device_of(module) is None
    assert place_module(module, HERE, torch.float32) and place_module(module, HERE, torch.bfloat16)


def test_another_type_leaves_products_on_their_device(saved: Saved, quantized: Quantized) -> None:
    model = load(quantized(saved("qwen3_moe"), linear("mixfp4", if_not_divisible="keep")), dtype=torch.float32)
    held = modules(model)
    assert all(place_module(module, HERE, torch.float32) for module in held)
    for module in held:
        module.half()
    assert {device_of(module) for module in held} == {HERE} and {module._dtype for module in held} == {torch.float16}
    assert all(module.decoded(name).device == HERE for module in held for name in module._packed)
