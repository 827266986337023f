"""The smallest checkpoints that have each kind of weight: dense, fused and single experts, tied embeddings, odd shapes.

Each is built for a K, so that blocks of any size fit; all widths are multiples of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dialects.gguf_models import tokenizer
from small_models import heavy_tailed, write_checkpoint

Shapes = dict[str, tuple[int, ...]]

VOCAB = 264
BASE: dict[str, Any] = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def _attention(k: int, rows: int) -> Shapes:
    """q, k, v and o of layer 0 with 2 * ``rows`` rows of queries and ``rows`` of keys, and the norms."""
    p = "model.layers.0."
    shapes: Shapes = {f"{p}{norm}_layernorm.weight": (k,) for norm in ("input", "post_attention")}
    shapes |= {f"{p}self_attn.{x}_proj.weight": (n * rows, k) for x, n in (("q", 2), ("k", 1), ("v", 1))}
    shapes[f"{p}self_attn.o_proj.weight"] = (k, k)
    return shapes


def _ends(k: int, head: bool = True) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (VOCAB, k), "model.norm.weight": (k,)}
    return {**shapes, "lm_head.weight": (VOCAB, k)} if head else shapes


def _qwen(k: int, rows: int, **more: Any) -> dict[str, Any]:
    return {**BASE, "hidden_size": k, "intermediate_size": k, "head_dim": rows, **more}


def dense(k: int, tied: bool = False) -> tuple[Shapes, dict[str, Any]]:
    """Qwen3; tied: without a lm_head of its own."""
    p = "model.layers.0.mlp."
    shapes = _ends(k, not tied) | _attention(k, k // 2)
    shapes |= {f"{p}gate_proj.weight": (k, k), f"{p}up_proj.weight": (k, k), f"{p}down_proj.weight": (k, k)}
    names = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    return shapes, _qwen(k, k // 2, **names, tie_word_embeddings=tied)


def odd_rows(k: int) -> tuple[Shapes, dict[str, Any]]:
    """Qwen3 with 74, 37 and a single row."""
    shapes, config = dense(k)
    p = "model.layers.0."
    shapes |= _attention(k, 37) | {f"{p}mlp.{x}_proj.weight": (1, k) for x in ("gate", "up")}
    return shapes, config | {"head_dim": 37}


def per_expert(k: int, experts: int = 3, inter: int | None = None) -> tuple[Shapes, dict[str, Any]]:
    """Qwen3-MoE, a tensor for each projection of each expert."""
    n = inter or k
    p = "model.layers.0.mlp."
    shapes = _ends(k) | _attention(k, k // 2) | {f"{p}gate.weight": (experts, k)}
    for e in range(experts):
        shapes |= {f"{p}experts.{e}.{x}_proj.weight": (n, k) for x in ("gate", "up")}
        shapes[f"{p}experts.{e}.down_proj.weight"] = (k, n)
    names = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    told = {"num_experts": experts, "num_experts_per_tok": 1, "moe_intermediate_size": n, "norm_topk_prob": True}
    return shapes, _qwen(k, k // 2, **names, **told)


def fused(k: int, experts: int = 3, rows: int | None = None) -> tuple[Shapes, dict[str, Any]]:
    """Qwen3.5-MoE with full attention: stacks [E, 2I, K] and [E, K, I], and a shared expert."""
    p = "model.language_model.layers.0."
    n = rows or k
    shapes = {key.replace("model.", "model.language_model.", 1): s for key, s in (_ends(k) | _attention(k, k)).items()}
    shapes["lm_head.weight"] = shapes.pop("lm_head.weight")
    shapes |= {f"{p}mlp.gate.weight": (experts, k), f"{p}mlp.shared_expert_gate.weight": (1, k)}
    shapes |= {f"{p}mlp.shared_expert.{x}_proj.weight": (n, k) for x in ("gate", "up")}
    shapes[f"{p}mlp.shared_expert.down_proj.weight"] = (k, k)
    shapes |= {f"{p}mlp.experts.gate_up_proj": (experts, 2 * n, k), f"{p}mlp.experts.down_proj": (experts, k, k)}
    text = {
        "model_type": "qwen3_5_moe_text",
        "hidden_size": k,
        "moe_intermediate_size": n,
        "num_experts": experts,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "full_attention_interval": 1,
        "vocab_size": VOCAB,
    }
    names = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"}
    return shapes, {**names, "dtype": "bfloat16", "tie_word_embeddings": False, "text_config": text}


def gpt_oss(k: int, experts: int = 3, inter: int | None = None) -> tuple[Shapes, dict[str, Any]]:
    """gpt-oss: stacks [E, K, 2I] whose gate and up columns alternate, biases, sinks."""
    n = inter or k
    p = "model.layers.0."
    shapes = _ends(k) | _attention(k, k // 2)
    rows = {"q": k, "k": k // 2, "v": k // 2, "o": k}
    shapes |= {f"{p}self_attn.{x}_proj.bias": (r,) for x, r in rows.items()}
    shapes |= {f"{p}self_attn.sinks": (2,), f"{p}mlp.router.weight": (experts, k), f"{p}mlp.router.bias": (experts,)}
    shapes |= {
        f"{p}mlp.experts.gate_up_proj": (experts, k, 2 * n),
        f"{p}mlp.experts.gate_up_proj_bias": (experts, 2 * n),
        f"{p}mlp.experts.down_proj": (experts, n, k),
        f"{p}mlp.experts.down_proj_bias": (experts, k),
    }
    names = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    told = {"num_local_experts": experts, "num_experts_per_tok": 1, "sliding_window": 64, "intermediate_size": n}
    return shapes, _qwen(k, k // 2, **names) | told


MODELS: dict[str, Callable[[int], tuple[Shapes, dict[str, Any]]]] = {
    "dense": dense,
    "tied": lambda k: dense(k, tied=True),
    "odd rows": odd_rows,
    "per expert": per_expert,
    "one expert": lambda k: per_expert(k, 1),
    "fused": fused,
    "one fused expert, odd rows": lambda k: fused(k, 1, 37),
    "gpt-oss": gpt_oss,
    "gpt-oss, one expert": lambda k: gpt_oss(k, 1),
}
"""The kinds of models, each for a K."""


def write(folder: Path, model: str, k: int) -> Path:
    """The checkpoint of a kind of model."""
    shapes, config = MODELS[model](k)
    rng = np.random.default_rng(k)
    source = write_checkpoint(folder, {name: heavy_tailed(rng, *shape) for name, shape in shapes.items()}, config)
    split = "gpt-4o" if model.startswith("gpt-oss") else "qwen2"
    (source / "tokenizer.json").write_text(json.dumps(tokenizer(split)))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": "{{ x }}"}))
    return source
