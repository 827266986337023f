"""Small checkpoints that are quantized already, as published models are; and their conversion, proven."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from halfbyte.checkpoint import Inventory, Reader
from halfbyte.convert.conversion import convert
from halfbyte.kernels.tensor_error import TensorError
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import Verification, verify
from small_models import Tensors, heavy_tailed, read_file, recipe, run, write_checkpoint

GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "sliding_window": 16,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
KIMI: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "n_routed_experts": 3,
    "tie_word_embeddings": False,
}
# as published: no format in the group, and an ignore list of another dialect's taste
KIMI_SETTINGS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "dynamic": False,
                "actorder": None,
                "observer": "minmax",
            },
        }
    },
}


def gpt_oss_tensors(inter: int = 64, seed: int = 0) -> Tensors:
    """gpt-oss in small: experts as [E, K, N] with gate and up in turn, biases, attention sinks."""
    rng = np.random.default_rng(seed)
    h, heads, vocab = GPT_OSS["hidden_size"], GPT_OSS["num_attention_heads"], GPT_OSS["vocab_size"]
    experts, width = GPT_OSS["num_local_experts"], GPT_OSS["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, h)}
    for layer in range(GPT_OSS["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for part, n, k in (("q", 64, h), ("k", 2 * width, h), ("v", 2 * width, h), ("o", h, 64)):
            shapes |= {f"{prefix}self_attn.{part}_proj.weight": (n, k), f"{prefix}self_attn.{part}_proj.bias": (n,)}
        shapes[f"{prefix}self_attn.sinks"] = (heads,)
        shapes |= {f"{prefix}mlp.router.weight": (experts, h), f"{prefix}mlp.router.bias": (experts,)}
        shapes[f"{prefix}mlp.experts.gate_up_proj"] = (experts, h, 2 * inter)
        shapes[f"{prefix}mlp.experts.gate_up_proj_bias"] = (experts, 2 * inter)
        shapes[f"{prefix}mlp.experts.down_proj"] = (experts, inter, h)
        shapes[f"{prefix}mlp.experts.down_proj_bias"] = (experts, h)
        shapes |= {f"{prefix}{part}_layernorm.weight": (h,) for part in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (vocab, h)}
    return {
        name: np.ones(shape, ml_dtypes.bfloat16) if "norm" in name else heavy_tailed(rng, *shape)
        for name, shape in shapes.items()
    }


def gpt_oss(folder: Path, inter: int = 64, spread: dict[int, int] | None = None) -> Path:
    """MXFP4 gpt-oss in its own dialect; ``spread``: expert -> halvings of its first row."""
    tensors = gpt_oss_tensors(inter)
    for expert, halvings in (spread or {}).items():
        for name in (n for n in tensors if n.endswith("gate_up_proj")):
            tensors[name][expert, :, 0] = (tensors[name][expert, :, 0].astype(np.float32) * 2.0**-halvings).astype(
                ml_dtypes.bfloat16
            )
    config = {**GPT_OSS, "intermediate_size": inter}
    source = write_checkpoint(folder.parent / f"{folder.name}-bf16", tensors, config)
    run(source, folder, recipe({"match": "experts", "format": "mxfp4", "scale_search": "absmax"}), "gpt-oss")
    return folder


def kimi(folder: Path) -> Path:
    """INT4 experts in compressed-tensors as Moonshot publishes them: ``weight_shape`` I32, its own configuration."""
    rng = np.random.default_rng(0)
    prefix, h, i = "model.layers.1.", 64, 32
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128, h), "lm_head.weight": (128, h)}
    shapes |= {f"{prefix}mlp.gate.weight": (3, h), f"{prefix}self_attn.o_proj.weight": (h, h)}
    for expert in range(3):
        shapes |= {f"{prefix}mlp.experts.{expert}.{part}_proj.weight": (i, h) for part in ("gate", "up")}
        shapes[f"{prefix}mlp.experts.{expert}.down_proj.weight"] = (h, i)
    plain = write_checkpoint(
        folder.parent / f"{folder.name}-bf16", {name: heavy_tailed(rng, *shape) for name, shape in shapes.items()}, KIMI
    )
    run(plain, folder.parent / f"{folder.name}-i64", recipe(EXPERTS_INT4), "compressed-tensors")
    tensors = read_file(folder.parent / f"{folder.name}-i64")
    for name in tensors:
        if name.endswith("weight_shape"):
            tensors[name] = tensors[name].astype(np.int32)
    return write_checkpoint(folder, tensors, {**KIMI, "quantization_config": KIMI_SETTINGS})


EXPERTS_INT4 = {"match": "experts", "format": "int4_g32", "scale_search": "absmax"}


def settings_of(folder: Path) -> dict[str, Any]:
    """The ``quantization_config`` of a folder."""
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


def carried(source: Path, out: Path, what: Any, dialect: str = "halfbyte") -> tuple[Plan, list[TensorError]]:
    """The plan, and the results of the weights that the source holds quantized."""
    plan = make_plan(Checkpoint.open(source), what, dialect)
    return plan, [error for error in convert(plan, out, threads=1).errors if error.source]


def proven(out: Path, source: Path, count: int) -> Verification:
    """That ``count`` weights have exactly the values of the source."""
    result = verify(out, source)
    assert result.problems == []
    assert result.lossless == count == sum(error.squared_error == 0 for error in result.errors if error.source)
    return result


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    infos = Inventory.open(folder).tensors
    return {name: (infos[name].dtype, infos[name].shape, a.tobytes()) for name, a in read_file(folder).items()}


def values(folder: Path) -> Tensors:
    checkpoint = Checkpoint.open(folder)
    with Reader(checkpoint.inventory) as reader:
        return {w.name: checkpoint.read(reader, w) for w in checkpoint.weights if w.name in checkpoint.formats}
