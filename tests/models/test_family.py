from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.checkpoint.inventory import Inventory
from halfbyte.errors import CheckpointError
from halfbyte.models import Piece, family_for
from timing import within

from .helpers import experts, inventory

LLAMA = {"model_type": "llama"}
MOE = {"model_type": "qwen3_moe", "num_experts": 2}


def test_a_family_is_found_by_model_type() -> None:
    assert family_for({"model_type": "mixtral"}).name == "mixtral"


def test_a_family_is_found_by_the_text_models_type() -> None:
    assert family_for({"model_type": "new_vlm", "text_config": {"model_type": "qwen3"}}).name == "qwen3"


def test_a_family_is_found_by_architecture() -> None:
    assert family_for({"architectures": ["Glm4MoeForCausalLM"]}).name == "glm4_moe"


def test_an_unknown_architecture_falls_back_and_says_so() -> None:
    family = family_for({"model_type": "brandnew"}, ["h.0.attn.q_proj.weight", "h.0.mystery"])
    assert family.is_generic
    assert "'brandnew' is unknown" in family.note and "1 of 2 tensors are recognised" in family.note


def test_a_known_architecture_has_no_note() -> None:
    family = family_for(LLAMA)
    assert not family.is_generic and family.note == ""


def test_an_empty_config_falls_back() -> None:
    assert "names no architecture" in family_for({}).note


def test_the_generic_family_finds_linears_by_their_usual_names() -> None:
    family = family_for({"model_type": "brandnew"})
    assert family.role("decoder.blocks.3.attention.q_proj.weight") == "attention.q"
    assert family.role("model.layers.1.block_sparse_moe.experts.3.w2.weight") == "experts.down"
    assert family.role("model.layers.1.mlp.gate.weight") == "router"
    assert family.role("decoder.blocks.3.mystery.weight") == "other"


def test_weights_keep_the_source_order_with_experts_at_their_first_piece() -> None:
    shapes = {"model.norm.weight": (8,), **experts(2), "lm_head.weight": (16, 8)}
    names = [w.name for w in family_for(MOE).weights(inventory(shapes, MOE))]
    prefix = "model.layers.0.mlp.experts."
    assert names == ["model.norm.weight", prefix + "gate_up_proj", prefix + "down_proj", "lm_head.weight"]


def test_fused_and_split_experts_give_the_same_weight_but_for_the_pieces() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    (fused,) = family_for(MOE).weights(inventory({name: (2, 8, 8)}, MOE))
    split = next(w for w in family_for(MOE).weights(inventory(experts(2), MOE)) if w.name == name)
    for field in ("name", "role", "layer", "shape", "dtype", "group", "row_parts", "interleaved", "transposed"):
        assert getattr(fused, field) == getattr(split, field)
    assert fused.pieces == (Piece(name),)


def test_experts_that_are_there_twice_are_refused() -> None:
    shapes = {**experts(2), "model.layers.0.mlp.experts.down_proj": (2, 8, 4)}
    with pytest.raises(CheckpointError, match=r"experts\.down_proj is there twice"):
        family_for(MOE).weights(inventory(shapes, MOE))


def test_a_missing_expert_is_refused_by_its_source_name() -> None:
    shapes = experts(2)
    del shapes["model.layers.0.mlp.experts.1.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.experts\.1\.up_proj\.weight"):
        family_for(MOE).weights(inventory(shapes, MOE))


def test_mixtral_w1_w3_w2_are_gate_up_and_down() -> None:
    config = {"model_type": "mixtral", "num_local_experts": 2}
    prefix = "model.layers.0.block_sparse_moe.experts."
    shapes = {f"{prefix}{e}.{w}.weight": (8, 4) if w == "w2" else (4, 8) for e in (0, 1) for w in ("w1", "w2", "w3")}
    gate_up, down = family_for(config).weights(inventory(shapes, config))
    assert (gate_up.name, gate_up.shape) == (prefix + "gate_up_proj", (2, 8, 8))
    assert gate_up.pieces[1] == Piece(prefix + "0.w3.weight", 0, (4, 8))
    assert down.sources == (prefix + "0.w2.weight", prefix + "1.w2.weight")


def test_members_of_a_group_share_a_key_per_module() -> None:
    parts = ["q", "k", "v", "o"]
    shapes = {f"model.layers.{i}.self_attn.{p}_proj.weight": (8, 8) for i in (0, 1) for p in parts}
    groups = [w.group for w in family_for(LLAMA).weights(inventory(shapes, LLAMA))]
    first, second = "model.layers.0.self_attn.qkv_proj", "model.layers.1.self_attn.qkv_proj"
    assert groups == [first, first, first, None, second, second, second, None]


def test_a_group_with_one_member_is_no_group() -> None:
    config = {"model_type": "phi"}
    (weight,) = family_for(config).weights(inventory({"model.layers.0.mlp.fc1.weight": (8, 8)}, config))
    assert weight.role == "mlp.up" and weight.group is None


def test_mtp_layers_have_groups_of_their_own() -> None:
    config = {"model_type": "qwen3_5_moe"}
    names = [f"{p}layers.0.self_attn.{x}_proj.weight" for p in ("model.", "mtp.") for x in "qkv"]
    weights = family_for(config).weights(inventory(dict.fromkeys(names, (8, 8)), config))
    assert {w.group for w in weights} == {"model.layers.0.self_attn.qkv_proj", "mtp.layers.0.self_attn.qkv_proj"}


def test_layers_beyond_the_main_model_are_mtp() -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2}
    shapes = {f"model.layers.{i}.self_attn.o_proj.weight": (8, 8) for i in (1, 2)}
    roles = [w.role for w in family_for(config).weights(inventory(shapes, config))]
    assert roles == ["attention.o", "mtp.attention.o"]


def test_gpt_oss_experts_are_interleaved_and_transposed() -> None:
    config = {"model_type": "gpt_oss", "hidden_size": 8}
    prefix = "model.layers.0.mlp.experts."
    shapes = {prefix + "gate_up_proj": (2, 8, 12), prefix + "down_proj": (2, 6, 8)}
    gate_up, down = family_for(config).weights(inventory(shapes, config))
    assert gate_up.interleaved and gate_up.row_parts == (("gate", 0, 6), ("up", 6, 12))
    assert gate_up.transposed and down.transposed and not down.interleaved


@pytest.mark.parametrize("transposed", [False, True])
def test_the_hidden_size_decides_how_experts_lie(transposed: bool) -> None:
    config = {"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": 8}}
    prefix = "model.language_model.layers.0.mlp.experts."
    shapes = {prefix + "gate_up_proj": (2, 12, 8), prefix + "down_proj": (2, 8, 6)}
    if transposed:
        shapes = {name: (e, k, n) for name, (e, n, k) in shapes.items()}
    gate_up, down = family_for(config).weights(inventory(shapes, config))
    assert gate_up.transposed is down.transposed is transposed
    assert gate_up.row_parts == (("gate", 0, 6), ("up", 6, 12))


def test_quantized_experts_stay_one_weight_per_tensor() -> None:
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    shapes = {f"{name}_packed": (4, 1), f"{name}_scale": (4, 1), f"{name}_shape": (2,)}
    weights = family_for(MOE).weights(inventory(shapes, MOE, dtype="I32"))
    assert [w.role for w in weights] == ["quantized.experts.gate_up"] * 3


def test_an_fp8_weight_is_marked_as_quantized() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    (weight,) = family_for(LLAMA).weights(inventory({name: (4, 4)}, LLAMA, dtype="F8_E4M3"))
    assert weight.role == "quantized.mlp.up" and weight.group is None


@pytest.mark.slow
def test_200_000_names_are_classified_in_about_a_second(shared: Path) -> None:
    checkpoint = Inventory.from_json(shared / "inventories" / "kimi_k2_thinking.patterns.json")
    weights = within(5, lambda: family_for(checkpoint.config).weights(checkpoint))  # about 0.7 s when nothing else runs
    assert len(weights) == len(checkpoint.tensors) == 208_215
