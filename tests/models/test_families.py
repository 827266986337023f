"""Every family over the tensor list of real files: nothing unknown, nothing misplaced, every group whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from halfbyte.checkpoint.inventory import Inventory
from halfbyte.models import Weight, families, family_for
from halfbyte.models.roles import LINEAR, bare_role, is_under

from .helpers import LISTS

NAMES = sorted(path.stem for path in LISTS.glob("*.json"))
SHARED = ["qwen36_35b_a3b", "gpt_oss_20b", "qwen3_0_6b", "llama_3_2_1b", "kimi_k2_thinking.patterns"]
NOT_LINEAR = ("norm", "embed", "router", "mlp.gate.", "mixer.gate.", "moe.gate.", "shared_expert_gate", "conv")

# what really is nothing else: embeddings of patches and positions, and a projection that is not a Linear
OTHER = {
    "model.visual.patch_embed.proj.weight",
    "model.visual.pos_embed.weight",
    "multi_modal_projector.mm_input_projection_weight",
    "vision_encoder.patch_conv.weight",
    "vision_model.class_embedding",
    "vision_model.conv1.weight",
    "vision_model.patch_embedding.linear.weight",
    "vision_model.positional_embedding",
    "vision_model.positional_embedding_vlm",
    "vision_tower.embeddings.patch_embedding.weight",
    "vision_tower.embeddings.position_embedding.weight",
    "vision_tower.head.attention.in_proj_weight",
    "vision_tower.head.probe",
    "vision_tower.patch_conv.weight",
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "vit_large_projector.weight",
}
OTHER_PARTS = (".attn.in_proj_weight", ".ls_1.gamma", ".ls_2.gamma")


@pytest.fixture(scope="module", params=[*NAMES, *SHARED])
def checkpoint(request: pytest.FixtureRequest, shared: Path) -> Inventory:
    folder = LISTS if request.param in NAMES else shared / "inventories"
    return Inventory.from_json(folder / f"{request.param}.json")


@pytest.fixture(scope="module")
def weights(checkpoint: Inventory) -> list[Weight]:
    return family_for(checkpoint.config).weights(checkpoint)


def linear(weight: Weight) -> bool:
    return any(is_under(bare_role(weight.role), prefix) for prefix in LINEAR)


def test_the_family_is_not_the_generic_one(checkpoint: Inventory) -> None:
    assert not family_for(checkpoint.config).is_generic


def test_every_tensor_is_in_exactly_one_weight(checkpoint: Inventory, weights: list[Weight]) -> None:
    counts = Counter(source for weight in weights for source in weight.sources)
    assert set(counts) == set(checkpoint.tensors) and set(counts.values()) == {1}


def test_no_elements_are_gained_or_lost(checkpoint: Inventory, weights: list[Weight]) -> None:
    def elements(shape: tuple[int, ...]) -> int:
        total = 1
        for size in shape:
            total *= size
        return total

    sources = sum(elements(tuple(t.shape)) for t in checkpoint.tensors.values())
    assert sum(elements(w.shape) for w in weights) == sources


def test_nothing_is_unknown(weights: list[Weight]) -> None:
    unknown = {w.name for w in weights if w.role.endswith("other") and w.name not in OTHER}
    assert not {name for name in unknown if not (name.startswith("vision_model.") and name.endswith(OTHER_PARTS))}


def test_no_router_norm_or_embedding_is_linear(weights: list[Weight]) -> None:
    wrong = [w.name for w in weights if linear(w) and any(part in w.name for part in NOT_LINEAR)]
    assert not wrong


@pytest.mark.slow
def test_the_generic_family_is_no_less_careful(checkpoint: Inventory) -> None:
    generic = family_for({})
    for weight in generic.weights(checkpoint):
        assert not (linear(weight) and any(part in weight.name for part in NOT_LINEAR)), weight.name


@pytest.mark.slow
def test_every_linear_weight_has_two_dimensions_or_more(weights: list[Weight]) -> None:
    assert all(len(w.shape) >= 2 for w in weights if linear(w) and "quantized" not in w.role)


def test_the_model_has_attention_and_mlp_or_experts(weights: list[Weight]) -> None:
    roles = {bare_role(w.role).split(".")[0] for w in weights}
    mixers = {"attention", "linear_attention", "mamba"}
    assert roles & mixers and (roles & {"mlp", "experts"} or "mamba" in roles) and "embedding" in roles


def test_groups_are_whole(weights: list[Weight]) -> None:
    # every plain q, k, v, gate, up ... of a layer that has partners is in a group with all of them
    members: dict[str, list[str]] = {}
    for weight in weights:
        if weight.group is not None:
            members.setdefault(weight.group, []).append(bare_role(weight.role).split(".")[-1])
    allowed = [["k", "q", "v"], ["gate", "up"], ["kv_a", "q_a"], ["qkv", "z"], ["a", "b"], ["k", "v"], ["k", "q"]]
    assert all(sorted(roles) in allowed for roles in members.values())
    ungrouped = {bare_role(w.role) for w in weights if w.group is None and "quantized" not in w.role}
    assert not ungrouped & {"attention.k", "attention.v", "linear_attention.qkv", "linear_attention.a"}


def test_fused_gate_and_up_rows_are_halves(weights: list[Weight]) -> None:
    for weight in weights:
        if weight.row_parts:
            rows = weight.shape[-1 if weight.transposed else -2]
            assert weight.row_parts == (("gate", 0, rows // 2), ("up", rows // 2, rows))


def test_every_family_has_a_tensor_list() -> None:
    covered = {family_for(Inventory.from_json(LISTS / f"{name}.json").config).name for name in NAMES}
    # llama has Llama-3.2-1B among the shared inventories too; Qwen3-VL-MoE only differs in how experts lie
    assert {family.name for family in families()} - covered <= {"qwen3_vl_moe"}


def test_qwen36_has_the_published_number_of_each_class(shared: Path) -> None:
    checkpoint = Inventory.from_json(shared / "inventories" / "qwen36_35b_a3b.json")
    counts = Counter(w.role for w in family_for(checkpoint.config).weights(checkpoint))
    assert sum(n for role, n in counts.items() if role.startswith("vision.")) == 333
    assert sum(n for role, n in counts.items() if role.startswith("mtp.")) == 19
    assert (counts["experts.gate_up"], counts["router"], counts["attention.o"]) == (40, 40, 10)
    assert (counts["linear_attention.qkv"], counts["linear_attention.conv"]) == (30, 30)
