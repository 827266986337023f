"""Groups whose tensors can share a scale per channel, and the reasons to leave a group alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte.checkpoint.inventory import Inventory
from halfbyte.models import family_for
from halfbyte.models.smoothing_groups import SmoothingGroup, find_groups
from halfbyte.source.checkpoint import Checkpoint

from .helpers import LISTS, experts, inventory

L = "model.layers.0."
ATTENTION = {L + f"self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"}
MLP = {L + "mlp.gate_proj.weight": (4, 8), L + "mlp.up_proj.weight": (4, 8), L + "mlp.down_proj.weight": (8, 4)}
NORMS = {L + "input_layernorm.weight": (8,), L + "post_attention_layernorm.weight": (8,)}
DENSE = {**NORMS, **ATTENTION, **MLP}


def groups(shapes: dict[str, tuple[int, ...]], model_type: str = "llama", **options: Any) -> dict[str, SmoothingGroup]:
    config = {"model_type": model_type, "hidden_size": 8}
    family = family_for(config)
    return {g.name: g for g in find_groups(family.weights(inventory(shapes, config)), family, **options)}


def names(group: SmoothingGroup) -> set[str]:
    return {w.name.split(".")[-2] for w in group.consumers}


def test_a_dense_layer_has_two_norms_and_a_product() -> None:
    found = groups(DENSE)
    assert [g.refusal for g in found.values()] == [None] * 3
    assert names(found[L + "input_layernorm.weight"]) == {"q_proj", "k_proj", "v_proj"}
    assert names(found[L + "post_attention_layernorm.weight"]) == {"gate_proj", "up_proj"}
    product = found[L + "mlp.up_proj.weight"]
    assert names(product) == {"down_proj"} and product.producers[0].kind == "rows" and product.channels == 4


def test_products_can_be_left_out() -> None:
    assert set(groups(DENSE, products=False)) == set(NORMS)


def test_everything_that_reads_the_norm_of_experts_is_in_its_group() -> None:
    shared = {L + f"mlp.shared_expert.{n}_proj.weight": (4, 8) for n in ("gate", "up")}
    shapes = {**NORMS, **ATTENTION, **experts(2), L + "mlp.gate.weight": (2, 8), **shared}
    shapes[L + "mlp.shared_expert_gate.weight"] = (1, 8)
    roles = [w.role for w in groups(shapes, "qwen3_5_moe_text")[L + "post_attention_layernorm.weight"].consumers]
    assert sorted(roles) == [
        *("experts.gate_up", "router", "shared_expert.gate", "shared_expert.up", "shared_expert_gate")
    ]


def test_a_stack_of_experts_has_a_scale_per_expert_for_the_rows_of_up() -> None:
    found = groups({**NORMS, **ATTENTION, **experts(2), L + "mlp.gate.weight": (2, 8)}, "qwen3_moe")
    product = found[L + "mlp.experts.gate_up_proj"]
    assert (product.experts, product.channels, product.producers[0].rows) == (2, 4, (4, 8))


@pytest.mark.parametrize(("model_type", "kind"), [("llama", "norm"), ("gemma", "zero_centred"), ("qwen3", "norm")])
def test_the_family_says_which_norms_are_zero_centred(model_type: str, kind: str) -> None:
    assert groups(DENSE, model_type)[L + "input_layernorm.weight"].producers[0].kind == kind


def test_gemma_3_feeds_its_mlp_from_the_norm_before_it() -> None:
    shapes = {**DENSE, L + "pre_feedforward_layernorm.weight": (8,), L + "post_feedforward_layernorm.weight": (8,)}
    found = groups(shapes, "gemma3_text")
    assert L + "post_attention_layernorm.weight" not in found
    assert names(found[L + "pre_feedforward_layernorm.weight"]) == {"gate_proj", "up_proj"}


def test_olmo_2_has_no_norm_before_its_projections() -> None:
    post = {L + "post_attention_layernorm.weight": (8,), L + "post_feedforward_layernorm.weight": (8,)}
    found = groups({**ATTENTION, **MLP, **post}, "olmo2")
    refusals = [g.refusal for g in found.values() if g.producers[:1] == ()]
    assert refusals == ["no norm is known to feed it"] and L + "post_attention_layernorm.weight" not in found


def test_a_norms_bias_is_divided_too() -> None:
    shapes = {**DENSE, L + "input_layernorm.bias": (8,)}
    kinds = [p.kind for p in groups(shapes, "phimoe")[L + "input_layernorm.weight"].producers]
    assert kinds == ["norm", "bias"]


def test_the_bias_of_up_is_divided_with_its_rows() -> None:
    found = groups({**DENSE, L + "mlp.up_proj.bias": (4,)})[L + "mlp.up_proj.weight"]
    assert [p.kind for p in found.producers] == ["rows", "bias"] and found.refusal is None


def test_experts_that_add_one_to_up_have_no_product() -> None:
    shapes = {L + "mlp.experts.gate_up_proj": (2, 8, 8), L + "mlp.experts.down_proj": (2, 4, 8)}
    assert set(groups({**shapes, **NORMS, **ATTENTION, L + "mlp.router.weight": (2, 8)}, "gpt_oss")) == set(NORMS)


def refusal(shapes: dict[str, tuple[int, ...]], name: str, model_type: str = "llama", **options: Any) -> str:
    return groups(shapes, model_type, **options)[name].refusal or ""


def test_an_unknown_architecture_is_left_alone() -> None:
    assert "architecture is unknown" in refusal(DENSE, L + "input_layernorm.weight", "brandnew")


def test_a_consumer_that_is_quantized_already_is_named() -> None:
    name = L + "self_attn.k_proj.weight"
    assert refusal(DENSE, L + "input_layernorm.weight", quantized={name}) == f"{name} is quantized in the source"


def test_a_size_that_does_not_fit_is_named() -> None:
    shapes = {**DENSE, L + "self_attn.k_proj.weight": (8, 6)}
    assert "k_proj.weight has the shape [8, 6], not 8 input columns" in refusal(shapes, L + "input_layernorm.weight")


def test_a_missing_norm_refuses_the_whole_layer() -> None:
    shapes = {n: s for n, s in DENSE.items() if "post_attention" not in n}
    found = groups(shapes)
    assert "gate_proj.weight in the same layer reads an input that is not known" in (
        found[L + "input_layernorm.weight"].refusal or ""
    )
    assert found[L + "mlp.gate_proj.weight"].refusal == "no norm is known to feed it"


def test_an_unknown_matrix_that_may_read_the_norm_refuses_it() -> None:
    shapes = {**DENSE, L + "mystery.weight": (3, 8), "model.layers.1.input_layernorm.weight": (8,)}
    shapes |= {f"model.layers.1.self_attn.{name}_proj.weight": (8, 8) for name in "qkv"}
    assert refusal(shapes, "model.layers.1.input_layernorm.weight") == ""
    assert "mystery.weight may read this norm too" in refusal(shapes, L + "input_layernorm.weight")


def test_tied_output_weights_are_left_alone() -> None:
    shapes = {**DENSE, "model.norm.weight": (8,), "model.embed_tokens.weight": (16, 8)}
    assert "tied" in refusal(shapes, "model.norm.weight")
    assert "tied" in refusal({**shapes, "lm_head.weight": (16, 8)}, "model.norm.weight", tied=True)
    assert refusal({**shapes, "lm_head.weight": (16, 8)}, "model.norm.weight") == ""


def test_output_weights_that_mtp_layers_share_are_left_alone() -> None:
    shapes = {**DENSE, "model.norm.weight": (8,), "lm_head.weight": (16, 8), "mtp.fc.weight": (8, 16)}
    assert "predict further tokens" in refusal(shapes, "model.norm.weight", "qwen3_5_text")


def test_a_routers_correction_reads_nothing() -> None:
    shapes = {**NORMS, **ATTENTION, **experts(2), L + "mlp.gate.weight": (2, 8)}
    shapes[L + "mlp.gate.e_score_correction_bias"] = (2,)
    group = groups(shapes, "deepseek_v3")[L + "post_attention_layernorm.weight"]
    assert group.refusal is None and [w.role for w in group.consumers].count("router") == 1


@pytest.mark.parametrize("path", sorted(LISTS.glob("*.json")), ids=lambda p: p.stem)
def test_no_weight_has_its_columns_scaled_twice(path: Path) -> None:
    source = Inventory.from_json(path)
    family = family_for(source.config)
    found = [g for g in find_groups(family.weights(source), family) if g.refusal is None]
    scaled = [w.name for g in found for w in g.consumers]
    assert len(scaled) == len(set(scaled)) and bool(scaled) == family.data.smoothing


def test_all_main_layers_of_qwen36_can_be_folded(shared: Path) -> None:
    checkpoint = Checkpoint(Inventory.from_json(shared / "inventories" / "qwen36_35b_a3b.json"))
    found = find_groups(checkpoint.weights, checkpoint.family)
    assert [g.name for g in found if g.refusal] == ["model.language_model.norm.weight"]
    assert len([g for g in found if g.producers[0].kind == "zero_centred" and not g.refusal]) == 2 * 41


def test_published_gpt_oss_experts_are_quantized_already(shared: Path) -> None:
    checkpoint = Checkpoint(Inventory.from_json(shared / "inventories" / "gpt_oss_20b.json"))
    found = find_groups(checkpoint.weights, checkpoint.family, checkpoint.formats)
    refusals = {g.refusal.split(" ", 1)[1] for g in found if g.refusal}
    assert refusals == {"is quantized in the source"} and len([g for g in found if not g.refusal]) == 25
