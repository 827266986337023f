from __future__ import annotations

import pytest

from halfbyte.models import family_schema as schema
from halfbyte.models.classify import Classifier
from halfbyte.models.name_templates import normalise

QWEN = Classifier(schema.read("qwen3_5_moe"))


def role(name: str, plain: bool = True, dimensions: int = 2) -> str:
    return QWEN.kind(normalise(name)).role_for(plain, dimensions, in_mtp=False)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model.", ""])
def test_prefixes_are_stripped(prefix: str) -> None:
    assert role(prefix + "layers.7.self_attn.q_proj.weight") == "attention.q"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp.gate.weight", "router"),
        ("mlp.gate_proj.weight", "mlp.gate"),
        ("mlp.shared_expert_gate.weight", "shared_expert_gate"),
        ("mlp.shared_expert.gate_proj.weight", "shared_expert.gate"),
    ],
)
def test_the_four_kinds_of_gate_are_told_apart(name: str, expected: str) -> None:
    assert role("model.layers.3." + name) == expected


def test_mtp_wraps_the_inner_role() -> None:
    assert role("mtp.layers.0.mlp.experts.5.down_proj.weight") == "mtp.experts.down"
    assert role("mtp.fc.weight") == "mtp.fc"
    assert role("mtp.something.weight") == "mtp.other"


def test_vision_is_never_an_attention_or_mlp() -> None:
    assert role("model.visual.blocks.2.attn.qkv.weight") == "vision.linear"
    assert role("vision_tower.layers.2.self_attn.q_proj.weight") == "vision.linear"


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale_inv", "qweight", "scales", "weight_shape"])
def test_parts_of_a_quantized_linear_are_marked(suffix: str) -> None:
    assert role(f"model.layers.0.self_attn.q_proj.{suffix}") == "quantized.attention.q"


def test_parts_of_quantized_fused_experts_are_marked() -> None:
    assert role("model.layers.0.mlp.experts.gate_up_proj_blocks", dimensions=4) == "quantized.experts.gate_up"


@pytest.mark.parametrize("dimensions", [0, 1, 3])
def test_scales_of_a_kv_cache_are_marked_whatever_their_shape(dimensions: int) -> None:
    for kind in ("k", "v"):
        wanted = f"quantized.attention.{kind}"
        assert role(f"model.layers.0.self_attn.{kind}_scale", dimensions=dimensions) == wanted
        assert role(f"model.layers.0.self_attn.{kind}_proj.{kind}_scale", dimensions=dimensions) == wanted


def test_a_packed_dtype_marks_the_weight_itself() -> None:
    assert role("model.layers.0.mlp.up_proj.weight", plain=False) == "quantized.mlp.up"
    assert role("mtp.layers.0.mlp.up_proj.weight", plain=False) == "quantized.mtp.mlp.up"


def test_a_matrix_role_needs_two_dimensions() -> None:
    assert role("model.layers.0.mlp.up_proj.weight", dimensions=1) == "other"
    assert role("mtp.layers.0.mlp.up_proj.weight", dimensions=1) == "mtp.other"
    assert role("model.visual.merger.gamma.weight", dimensions=1) == "vision.other"


def test_an_unknown_name_is_other() -> None:
    assert role("model.layers.0.mystery.weight") == "other"
