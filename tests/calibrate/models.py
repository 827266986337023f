"""A small dense model and a text, made anew for tests of calibrations: random weights, the demo's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from halfbyte.demo import MODEL


def dense_model(folder: Path, layers: int = 2) -> Path:
    """A Qwen3 of 64 channels with the demo model's tokenizer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=vocabulary(),
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return folder


def vocabulary() -> int:
    """Of the demo's tokenizer."""
    from halfbyte.runtime.loading import load_tokenizer

    return len(load_tokenizer(MODEL))
