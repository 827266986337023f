from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import halfbyte.transformers
from halfbyte.errors import HalfbyteError
from halfbyte.runtime import load
from halfbyte.runtime.remote.halfbyte_modules import QuantizedWeights
from small_models import linear, read_file, write_file

Saved = Callable[[str], Path]
Quantized = Callable[..., Path]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 20, 30]])


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "mixtral"])
def test_an_auto_class_loads_the_dialect_as_halfbyte_load_does(
    architecture: str, saved: Saved, quantized: Quantized
) -> None:
    path = quantized(saved(architecture), linear("mixfp4", if_not_divisible="keep"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert any(isinstance(module, QuantizedWeights) for module in model.modules())
    assert torch.equal(logits(model), logits(load(path, torch.float32)))


def test_a_model_with_vision_loads_whole_and_as_text_only(saved: Saved, quantized: Quantized) -> None:
    path = quantized(saved("qwen3_5_moe"), linear("nvfp4", if_not_divisible="keep"))
    whole = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    text = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert type(whole).__name__ == "Qwen3_5MoeForConditionalGeneration"
    assert type(text).__name__ == "Qwen3_5MoeForCausalLM"
    assert torch.equal(logits(whole), logits(text))
    assert torch.equal(logits(whole), logits(load(path, torch.float32)))


def test_the_dtype_of_the_config_is_the_default(saved: Saved, quantized: Quantized) -> None:
    path = quantized(saved("qwen3"), linear("nvfp4"))
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16 == model.model.layers[0].mlp.up_proj.weight.dtype


def test_dequantize_makes_the_model_dense(saved: Saved, quantized: Quantized) -> None:
    path = quantized(saved("qwen3"), linear("nvfp4"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    before = logits(model)
    model.dequantize()
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_a_missing_tensor_is_an_error_also_here(saved: Saved, quantized: Quantized, tmp_path: Path) -> None:
    source = quantized(saved("qwen3"), linear("nvfp4"))
    tensors = {n: t for n, t in read_file(source).items() if n != "model.norm.weight"}
    write_file(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM: the checkpoint lacks model\.norm\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_incomplete_quantized_weight_is_an_error_also_here(
    saved: Saved, quantized: Quantized, tmp_path: Path
) -> None:
    source = quantized(saved("qwen3"), linear("nvfp4"))
    lost = "model.layers.0.mlp.up_proj.weight_codes"
    write_file(tmp_path / "model.safetensors", {n: t for n, t in read_file(source).items() if n != lost})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_in_4_bit_refuses_to_be_saved_by_transformers(
    saved: Saved, quantized: Quantized, tmp_path: Path
) -> None:
    model = load(quantized(saved("qwen3"), linear("nvfp4")))
    with pytest.raises(HalfbyteError, match="saved by copying its checkpoint /"):
        model.save_pretrained(tmp_path)


def test_another_version_of_the_dialect_is_refused() -> None:
    with pytest.raises(ValueError, match="version 99 of the halfbyte dialect"):
        halfbyte.transformers.HalfbyteQuantizationConfig(version=99)


def test_a_weight_without_a_stated_format_is_refused() -> None:
    config = halfbyte.transformers.HalfbyteQuantizationConfig(weights={"nvfp4": ["re:.*up_proj"]})
    with pytest.raises(ValueError, match=r"which format model\.norm\.weight has"):
        config.about("model.norm.weight")
