"""What llama.cpp wants to know of a model, from its config.json: the keys that llama.cpp's converter writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.checkpoint import Inventory
from halfbyte.checkpoint.foreign import Fields
from halfbyte.dialects.gguf_models import Model, library, model_of
from halfbyte.errors import PlanError

# what llama.cpp's graphs take for granted: key -> value where config.json says nothing
_FIXED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "partial_rotary_factor": 1.0},
    "qwen3": {"hidden_act": "silu", "partial_rotary_factor": 1.0, "use_sliding_window": False, "attention_bias": False},
    "qwen3moe": {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_bias": False,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gpt-oss": {"hidden_act": "silu", "swiglu_limit": 7.0, "attention_bias": True},
}
# the defaults of transformers' configuration classes, where they are none of the above
_MOST = 2**32 - 1  # GGUF holds such counts as 32-bit numbers
_MISSING = {"norm_topk_prob": False}
_ROPE_TYPES = {
    "llama": ("default", "linear", "llama3", "yarn"),
    "qwen3": ("default", "linear", "yarn"),
    "qwen3moe": ("default", "linear", "yarn"),
    "gpt-oss": ("default", "yarn"),
}


def general(writer: Any, root: Path, name: str, parameters: tuple[int, int, int, int]) -> None:
    """Name, size and what the model card says: the library's own reading of it."""
    gguf = library()
    card = gguf.Metadata.load(None, root, name, parameters[0])
    if card.size_label is None and parameters[0] > 0:
        card.size_label = gguf.size_label(*parameters)
    writer.add_type(gguf.GGUFType.MODEL)
    card.set_gguf_meta_model(writer)


def describe(writer: Any, inventory: Inventory, model: Model) -> None:
    """Sizes, heads, experts and rotary embedding; PlanError for what llama.cpp computes in another way."""
    config = inventory.config
    _check(config, model, inventory.source)
    layers, hidden, heads = (_int(config, k) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    fields = _fields(config, inventory.source)
    writer.add_block_count(layers)
    writer.add_context_length(_int(config, "max_position_embeddings"))
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(_int(config, "intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(fields.count("num_key_value_heads", most=_MOST) or heads)
    head = head_size(inventory)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(fields.number("rms_norm_eps", 1e-6))
    if model.name == "llama":
        writer.add_vocab_size(rows_of(inventory, "model.embed_tokens.weight"))
        writer.add_rope_dimension_count(head)
    if model.name in ("qwen3moe", "gpt-oss"):
        key = "num_experts" if "num_experts" in config else "num_local_experts"
        writer.add_expert_count(_int(config, key))
        writer.add_expert_used_count(_int(config, "num_experts_per_tok"))
        inner = "moe_intermediate_size" if model.name == "qwen3moe" else "intermediate_size"
        writer.add_expert_feed_forward_length(_int(config, inner))
    if model.name == "gpt-oss":
        writer.add_sliding_window(_int(config, "sliding_window"))
    _rope(writer, rope_parameters(config, inventory.source), _int(config, "max_position_embeddings"))


def rope_parameters(config: Mapping[str, Any], source: str) -> Fields:
    """Type, base and scaling of the rotary embedding, in the spelling of new and of old configurations."""
    fields = _fields(config, source)
    key = "rope_parameters" if fields.fields("rope_parameters") else "rope_scaling"
    rope = fields.fields(key)
    theta, kind = fields.number("rope_theta", 10000.0), rope.text("type", "default")
    stated = {k: v for k, v in rope.values.items() if v is not None}
    return Fields({"rope_theta": theta, "rope_type": kind, **stated}, rope.file, key)


def rope_factors(config: Mapping[str, Any], model: Model, source: str) -> NDArray[np.float32] | None:
    """Divisors of the rotary frequencies that Llama 3 scales by their wavelength; None for others.

    As ``rope_type: llama3`` of transformers' modeling_rope_utils.
    """
    rope = rope_parameters(config, source)
    if model.name != "llama" or rope.text("rope_type") != "llama3":
        return None
    hidden, heads = _int(config, "hidden_size"), _int(config, "num_attention_heads")
    size = _fields(config, source).count("head_dim", most=_MOST) or hidden // heads
    factor, low, high, context = (
        _positive(rope, key)
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    wavelengths = 2 * math.pi * np.float32(_positive(rope, "rope_theta")) ** exponents
    if high <= low:
        raise PlanError(f"high_freq_factor of {source} must be larger than its low_freq_factor")
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    values = np.where(wavelengths < context / high, 1.0, np.where(wavelengths > context / low, factor, between))
    return values.astype("<f4")


def head_size(inventory: Inventory) -> int:
    """Rows of a head of q, as the first layer has it."""
    return rows_of(inventory, "model.layers.0.self_attn.q_proj.weight") // _int(inventory.config, "num_attention_heads")


def remarks(inventory: Inventory) -> list[str]:
    """Where llama.cpp computes a little otherwise than config.json asks for."""
    notes = []
    window = inventory.config.get("sliding_window")
    if model_of(inventory.config).name == "llama" and window:
        notes.append(f"llama.cpp attends to the whole context, not to sliding_window = {window}")
    if rope_parameters(inventory.config, inventory.source).values.get("truncate") is False:
        notes.append(
            "llama.cpp rounds the boundaries of YaRN to whole dimensions (rope_parameters.truncate is false here), "
            "so its log-probs differ slightly"
        )
    return notes


def rows_of(inventory: Inventory, name: str) -> int:
    """Rows of a matrix, in whatever dialect the source spells it."""
    # codes have as many rows as the weight
    spelled = (name, f"{name}_packed", f"{name}_codes")
    tensor = next((t for n in spelled if (t := inventory.tensors.get(n))), None)
    if tensor is None or len(tensor.shape) != 2:
        raise PlanError(f"{inventory.source} has no matrix {name}, so its sizes are not known")
    return tensor.shape[0]


def _rope(writer: Any, rope: Fields, positions: int) -> None:
    gguf = library()
    writer.add_rope_freq_base(_positive(rope, "rope_theta"))
    kinds = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
    kind = kinds.get(rope.text("rope_type"))
    if kind is None:
        return
    writer.add_rope_scaling_type(kind)
    writer.add_rope_scaling_factor(_positive(rope, "factor"))
    if rope.text("rope_type") == "yarn":
        context = rope.count("original_max_position_embeddings", positions, most=_MOST)
        writer.add_rope_scaling_orig_ctx_len(context)
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if key in rope:
                add(rope.number(key))


def _check(config: Mapping[str, Any], model: Model, source: str) -> None:
    rope = rope_parameters(config, source)
    given = {"partial_rotary_factor": rope.number("partial_rotary_factor", 1.0), **config}
    for key, wanted in _FIXED[model.name].items():
        stated = given.get(key, _MISSING.get(key, wanted))
        if stated != wanted and not (wanted == [] and not stated):
            raise PlanError(
                f"config.json of {source} says {key} = {str(stated)[:80]}, but llama.cpp's {model.name} computes with "
                f"{wanted!r}; choose another dialect"
            )
    kind = rope.text("rope_type")
    if kind not in _ROPE_TYPES[model.name]:
        raise PlanError(
            f"the rotary embedding of {source} is of type {kind!r}; "
            f"GGUF is written for {', '.join(_ROPE_TYPES[model.name])}"
        )
    layers = _fields(config, source).texts("layer_types")
    usual = ["full_attention"] * len(layers)
    if model.name == "gpt-oss":
        usual = [("sliding_attention", "full_attention")[i % 2] for i in range(len(layers))]
    if layers and layers != usual:
        raise PlanError(f"layer_types of {source} are not those that llama.cpp's {model.name} computes with")


def _fields(config: Mapping[str, Any], source: str) -> Fields:
    return Fields(config, f"config.json of {source}")


def _int(config: Mapping[str, Any], key: str) -> int:
    value = Fields(config, "config.json").count(key, least=1, most=_MOST)
    if value is None:
        raise PlanError(f"config.json says no {key}, which a GGUF file must state")
    return value


def _positive(rope: Fields, key: str) -> float:
    value = rope.number(key)
    if value is None or value <= 0:
        raise PlanError(f"{rope.path} in {rope.file} has no positive {key}, which a GGUF file must state")
    return value
