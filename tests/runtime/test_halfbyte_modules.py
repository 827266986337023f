from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from halfbyte import encode, get_format
from halfbyte.dialects.halfbyte import stored_arrays
from halfbyte.formats import QuantizedTensor
from halfbyte.runtime.decode import to_torch
from halfbyte.runtime.remote import halfbyte_modules
from halfbyte.runtime.remote.halfbyte_modules import dequantize_module, quantize_module


def parts_of(tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {part: to_torch(array) for part, array in stored_arrays(tensor).items()}


def quantize(module: nn.Module, name: str, fmt: str) -> torch.Tensor:
    """Replace a parameter; returns the values that it now has."""
    tensor = encode(module.get_parameter(name).detach().float().numpy(), fmt, search="absmax")
    quantize_module(module, name, get_format(fmt).describe(), parts_of(tensor))
    return torch.from_numpy(tensor.decode())


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 32, bias=bias).to(dtype)


def experts() -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2)
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.requires_grad_(False)


def route(*chosen: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three tokens that all go to the same two experts."""
    torch.manual_seed(1)
    return torch.randn(3, 64), torch.tensor([chosen] * 3), torch.full((3, 2), 0.5)


def test_a_quantized_linear_computes_with_the_decoded_weight_and_its_own_bias() -> None:
    module = linear()
    weight = quantize(module, "weight", "nvfp4")
    x = torch.randn(5, 64)
    assert torch.equal(module(x), nn.functional.linear(x, weight, module.bias))


def test_a_quantized_linear_keeps_its_type_and_holds_no_dense_weight() -> None:
    module = linear()
    quantize(module, "weight", "mixfp4")
    assert isinstance(module, nn.Linear) and type(module).__name__ == "QuantizedLinear"
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    assert set(module.state_dict()) == {"bias", "weight_codes", "weight_scales", "weight_tensor_scale"}


@pytest.mark.parametrize("fmt", ["nvfp4", "int4_g32", "affine4_g32"])
def test_a_change_of_dtype_rounds_the_decoded_weight_and_never_what_is_stored(fmt: str) -> None:
    module = linear()
    weight = quantize(module, "weight", fmt)
    stored = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.to(torch.float16)
    module.to(torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16 == module.bias.dtype
    assert torch.equal(module.weight, weight.bfloat16())
    for name, buffer in module.named_buffers():
        assert buffer.dtype == stored[name].dtype and torch.equal(buffer, stored[name])


def test_a_module_moved_to_another_device_takes_its_codes_along() -> None:
    module = linear()
    quantize(module, "weight", "nvfp4")
    module.to("meta")
    assert {buffer.device.type for buffer in module.buffers()} == {"meta"}


def test_an_embedding_can_be_quantized_as_well() -> None:
    module = nn.Embedding(48, 64)
    weight = quantize(module, "weight", "int4_g64")
    ids = torch.tensor([[3, 0, 47]])
    assert torch.equal(module(ids), nn.functional.embedding(ids, weight))


def test_experts_compute_as_their_own_eager_loop_with_the_decoded_weights() -> None:
    module, dense = experts(), experts()
    for name in ("gate_up_proj", "down_proj"):
        getattr(dense, name).copy_(quantize(module, name, "mixfp4"))
    dense.config._experts_implementation = "eager"
    assert torch.equal(module(*route(2, 5)), dense(*route(2, 5)))


def test_only_the_experts_that_got_tokens_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    module = experts()
    for name in ("gate_up_proj", "down_proj"):
        quantize(module, name, "nvfp4")
    shapes: list[tuple[int, ...]] = []
    original = halfbyte_modules.Decoder.__call__

    def spy(self: Any, codes: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(codes.shape))
        return original(self, codes, *args, **kwargs)

    monkeypatch.setattr(halfbyte_modules.Decoder, "__call__", spy)
    module(*route(2, 5))
    assert shapes == [(64, 32), (64, 16)] * 2


def test_a_stack_of_experts_can_be_indexed_and_used_like_the_tensor_it_stands_for() -> None:
    module = experts()
    whole = quantize(module, "down_proj", "nvfp4")
    stack = module.down_proj
    assert torch.equal(stack[3], whole[3])
    assert torch.equal(stack[torch.tensor([1, 6])], whole[[1, 6]])
    assert torch.equal(stack[2:4], whole[2:4])
    assert torch.equal(stack[1, :4], whole[1, :4])
    assert torch.equal(stack.transpose(1, 2), whole.transpose(1, 2))
    assert torch.equal(torch.bmm(torch.ones(8, 1, 64), stack), torch.bmm(torch.ones(8, 1, 64), whole))
    assert stack.shape == whole.shape


def test_hif4_experts_whose_scales_are_unsigned_words_can_be_chosen_by_a_tensor_of_indices() -> None:
    module = experts()
    whole = quantize(module, "gate_up_proj", "hif4")
    assert torch.equal(module.gate_up_proj[torch.tensor([7, 0])], whole[[7, 0]])


def test_dequantizing_gives_the_ordinary_module_back() -> None:
    module = linear(dtype=torch.bfloat16)
    weight = quantize(module, "weight", "nvfp4")
    dequantize_module(module)
    assert type(module) is nn.Linear
    assert torch.equal(module.weight, weight.bfloat16()) and not list(module.buffers())


def test_a_copy_of_a_quantized_module_is_independent() -> None:
    module = linear()
    weight = quantize(module, "weight", "nvfp4")
    twin = copy.deepcopy(module)
    module.weight_codes.zero_()
    assert torch.equal(twin.weight, weight)


def test_codes_of_another_shape_are_refused() -> None:
    wrong = encode(np.ones((32, 128), np.float32), "nvfp4", search="absmax")
    with pytest.raises(ValueError, match=r"weight of Linear has shape \[32, 64\], the checkpoint \[32, 128\]"):
        quantize_module(linear(), "weight", get_format("nvfp4").describe(), parts_of(wrong))
