"""ModelOpt's dialect through transformers' auto classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import halfbyte.transformers  # noqa: F401
from halfbyte.runtime import load
from halfbyte.runtime.packed_modules import PackedWeights
from small_models import linear, recipe

Saved = Callable[[str], Path]
Quantized = Callable[..., Path]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.mark.parametrize("fmt", ["nvfp4", "fp8_channel"])
def test_an_auto_class_loads_dense_modelopt_checkpoints_as_halfbyte_load_does(
    fmt: str, saved: Saved, quantized: Quantized
) -> None:
    path = quantized(saved("qwen3"), linear(fmt, if_not_divisible="keep"), "modelopt")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert any(isinstance(module, PackedWeights) for module in model.modules())
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, load(path, "float32")(IDS).logits)


def test_what_it_cannot_load_names_halfbyte_load(saved: Saved, quantized: Quantized) -> None:
    path = quantized(saved("qwen3_moe"), recipe({"match": "experts", "format": "nvfp4"}), "modelopt")
    with pytest.raises(ValueError, match=r"experts.*use halfbyte\.load"):
        AutoModelForCausalLM.from_pretrained(path)
