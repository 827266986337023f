"""Tiny models of many architectures with random weights, saved by transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
QWEN35_TEXT: dict[str, Any] = {
    **COMMON,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
    },
}
QWEN35_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def _model(name: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = getattr(transformers, f"{name}Config")(**{**COMMON, **settings})
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


def _qwen35_with_vision() -> Any:
    config = transformers.Qwen3_5MoeConfig(
        text_config=QWEN35_TEXT,
        vision_config=QWEN35_VISION,
        tie_word_embeddings=False,
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": _model("Llama"),
    "llama-tied": _model("Llama", tie_word_embeddings=True),
    "qwen3": _model("Qwen3"),
    "phi3": _model("Phi3"),
    "qwen3_moe": _model(
        "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1
    ),
    # wide enough for blocks of 128
    "qwen3_moe_wide": _model(
        "Qwen3Moe",
        hidden_size=128,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        decoder_sparse_step=1,
        num_hidden_layers=1,
    ),
    "mixtral": _model("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "olmoe": _model("Olmoe", num_experts=4, num_experts_per_tok=2),
    "glm4_moe": _model(
        "Glm4Moe",
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "deepseek_v3": _model(
        "DeepseekV3",
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    "gpt_oss": _model("GptOss", num_local_experts=4, num_experts_per_tok=2, intermediate_size=64),
    "qwen3_5_moe": _qwen35_with_vision,
}


def save(name: str, folder: Path) -> Path:
    """The architecture's model in BF16 (same weights every time), written as transformers publishes it."""
    torch.manual_seed(7)
    model = ARCHITECTURES[name]().to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # initial biases and norms are constants, which would hide a wrong place
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
