"""Classes of transformers that name, lay out or initialise their weights in ways of their own, with packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import halfbyte  # noqa: E402

SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # a stack is renamed, and its tensors end in .weight
    "granitemoe": (
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**SMALL, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4},
    ),
    # experts lie as [E, in, out] without a flag that says so
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**SMALL, **HEADS, "intermediate_size": 32, "intermediate_size_mlp": 96, "num_local_experts": 4},
    ),
    # a module initialises the weights of its children
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 2},
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_packed_weights_give_the_logits_of_decoded_ones(tmp_path: Path, name: str) -> None:
    model_class, config_class, arguments = CLASSES[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    halfbyte.quantize(tmp_path / "model", tmp_path / "out", recipe="nvfp4", dialect="halfbyte")
    packed = halfbyte.load(tmp_path / "out", "float32")
    dense = halfbyte.load(tmp_path / "out", "float32", dequantize=True)
    assert sum(p.numel() for p in packed.parameters()) < sum(p.numel() for p in dense.parameters()) / 2
    tokens = torch.arange(1, 17)[None]
    inputs = {"input_ids": tokens, "use_cache": False}
    if packed.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    with torch.no_grad():
        got, expected = packed(**inputs).logits, dense(**inputs).logits
    assert torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max()))
