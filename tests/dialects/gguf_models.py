"""Small checkpoints of every model that GGUF files are written for, with a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from halfbyte.dialects.gguf_vocab import _SPLITS
from small_models import Tensors, heavy_tailed, write_checkpoint

H, HEADS, KEYS, HEAD, INTER, EXPERTS, LAYERS, VOCAB = 128, 4, 2, 32, 64, 4, 2, 320
BASE = {
    "hidden_size": H,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "head_dim": HEAD,
    "intermediate_size": 2 * INTER,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": INTER, "norm_topk_prob": True}
OSS = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": 64, "intermediate_size": INTER}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_parameters": LLAMA3},
    "qwen3": {**BASE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3moe": {**BASE, **MOE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
    "gpt-oss": {**BASE, **OSS, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"},
}
SPLIT = {"llama": "llama-bpe", "qwen3": "qwen2", "qwen3moe": "qwen2", "gpt-oss": "gpt-4o"}


def tensors(name: str, seed: int = 0) -> Tensors:
    """Weights with the names and the layout of the source; gpt-oss experts lie as [E, K, N]."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {f"{p}.weight": (VOCAB, H) for p in ("model.embed_tokens", "lm_head")}
    shapes["model.norm.weight"] = (H,)
    rows = {"q": HEADS * HEAD, "k": KEYS * HEAD, "v": KEYS * HEAD}
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        shapes |= {f"{p}{norm}_layernorm.weight": (H,) for norm in ("input", "post_attention")}
        shapes |= {f"{p}self_attn.{x}_proj.weight": (n, H) for x, n in rows.items()}
        shapes[f"{p}self_attn.o_proj.weight"] = (H, HEADS * HEAD)
        if name in ("llama", "gpt-oss"):
            shapes |= {f"{p}self_attn.{x}_proj.bias": (n,) for x, n in {**rows, "o": H}.items()}
        if name.startswith("qwen3"):
            shapes |= {f"{p}self_attn.{x}_norm.weight": (HEAD,) for x in "qk"}
        if name in ("llama", "qwen3"):
            shapes |= {f"{p}mlp.{x}_proj.weight": (2 * INTER, H) for x in ("gate", "up")}
            shapes[f"{p}mlp.down_proj.weight"] = (H, 2 * INTER)
        if name == "qwen3moe":
            shapes[f"{p}mlp.gate.weight"] = (EXPERTS, H)
            for e in range(EXPERTS):
                shapes |= {f"{p}mlp.experts.{e}.{x}_proj.weight": (INTER, H) for x in ("gate", "up")}
                shapes[f"{p}mlp.experts.{e}.down_proj.weight"] = (H, INTER)
        if name == "gpt-oss":
            shapes |= {f"{p}mlp.router.weight": (EXPERTS, H), f"{p}mlp.router.bias": (EXPERTS,)}
            shapes |= {
                f"{p}self_attn.sinks": (HEADS,),
                f"{p}mlp.experts.gate_up_proj": (EXPERTS, H, 2 * INTER),
                f"{p}mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * INTER),
                f"{p}mlp.experts.down_proj": (EXPERTS, INTER, H),
                f"{p}mlp.experts.down_proj_bias": (EXPERTS, H),
            }
    return {key: heavy_tailed(rng, *shape) for key, shape in shapes.items()}


def tokenizer(split: str = "qwen2") -> dict[str, Any]:
    """Byte-level BPE with two merges and two special tokens; ``split``: what llama.cpp calls its pre-tokenizer."""
    # the 256 letters that stand for bytes in byte-level BPE
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) if b in plain else "" for b in range(256)]
    extra = iter(range(256, 512))
    words = [letter or chr(next(extra)) for letter in letters]
    vocab = {word: i for i, word in enumerate([*words, "he", "the"])}
    regex = next(pattern for pattern, name in _SPLITS.items() if name == split)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 258, "content": "<|end|>", "special": True, "normalized": False},
            {"id": 259, "content": "<tool>", "special": False, "normalized": False},
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [["h", "e"], ["t", "he"]],
            "byte_fallback": False,
            "ignore_merges": split == "llama-bpe",
        },
    }


def checkpoint(folder: Path, name: str, dtype: Any = ml_dtypes.bfloat16, **config: Any) -> Path:
    """A checkpoint folder of the model that GGUF calls ``name``."""
    source = write_checkpoint(folder, {k: v.astype(dtype) for k, v in tensors(name).items()}, CONFIGS[name] | config)
    (source / "tokenizer.json").write_text(json.dumps(tokenizer(SPLIT[name])))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": "{{ x }}"}))
    return source
