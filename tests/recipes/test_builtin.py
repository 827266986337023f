"""Every built-in recipe on real inventories."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

import pytest

from halfbyte.checkpoint.inventory import Inventory
from halfbyte.formats import get_format
from halfbyte.models import Weight, family_for
from halfbyte.recipes import list_recipes, load_recipe, parse_recipe, resolve
from halfbyte.search import get_search

REPOSITORY = Path(__file__).resolve().parents[2]
MOE_ONLY = {"makora-mixfp4", "nvfp4-fp8", "nvidia-nvfp4"}
UD = {"ud-mxfp4", "ud-q4"}
DENSE = sorted(set(list_recipes()) - MOE_ONLY - UD)


@pytest.fixture(scope="module")
def qwen36(shared: Path) -> list[Weight]:
    checkpoint = Inventory.from_json(shared / "inventories" / "qwen36_35b_a3b.json")
    return family_for(checkpoint.config).weights(checkpoint)


def parameters(weights: list[Weight], name: str) -> Counter[str]:
    """Parameters by format, or by action where there is none."""
    counts: Counter[str] = Counter()
    for weight, decision in zip(weights, resolve(load_recipe(name), weights), strict=True):
        counts[decision.format or decision.action] += prod(weight.shape)
    return counts


@pytest.mark.parametrize("name", list_recipes())
def test_a_builtin_is_named_as_its_file_and_described(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description


@pytest.mark.parametrize("name", list_recipes())
def test_a_builtin_names_formats_and_searches_that_go_together(name: str) -> None:
    for rule in load_recipe(name).rules:
        if rule.format is not None:
            get_search(rule.scale_search, get_format(rule.format))


@pytest.mark.parametrize(
    ("name", "chosen_by"),
    [
        ("nvfp4-gptq", ("gptq_loss", None)),
        ("mixfp4-gptq", ("gptq_loss", None)),
        ("int4-gptq", ("gptq_loss", None)),
        ("mxfp4-gptq", (None, True)),
    ],
)
def test_gptq_chooses_scales_when_it_measured_best_for_the_format(
    name: str, chosen_by: tuple[str | None, bool | None]
) -> None:
    (rule,) = load_recipe(name).rules
    assert (rule.rounding, rule.order, rule.damping) == ("gptq", "act", 0.01)
    assert (rule.objective, rule.static_groups) == chosen_by


@pytest.mark.parametrize("name", list_recipes())
def test_a_builtin_applies_to_the_mixture_of_experts(name: str, qwen36: list[Weight]) -> None:
    assert any(d.action == "quantize" for d in resolve(load_recipe(name), qwen36))


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("model", ["llama_3_2_1b", "qwen3_0_6b"])
def test_a_plain_builtin_applies_to_dense_models(name: str, model: str, shared: Path) -> None:
    checkpoint = Inventory.from_json(shared / "inventories" / f"{model}.json")
    weights = family_for(checkpoint.config).weights(checkpoint)
    counts = Counter(d.action for d in resolve(load_recipe(name), weights))
    heads = sum(w.role == "lm_head" for w in weights) if "-head" in name else 0
    assert counts["quantize"] == 7 * max(w.layer + 1 for w in weights if w.layer is not None) + heads


@pytest.mark.parametrize("name", sorted(set(list_recipes()) - UD))
def test_no_builtin_touches_router_norms_embeddings_vision_or_mtp(name: str, qwen36: list[Weight]) -> None:
    touched = {
        w.role.split(".")[0]
        for w, d in zip(qwen36, resolve(load_recipe(name), qwen36), strict=True)
        if d.action == "quantize"
    }
    assert touched <= {"attention", "linear_attention", "experts", "shared_expert", "lm_head"}


def test_the_guide_names_every_builtin() -> None:
    guide = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in list_recipes() if f"`{name}`" not in guide] == []


def test_the_guides_example_is_a_valid_recipe() -> None:
    guide = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert parse_recipe(guide.split("```yaml\n")[1].split("```")[0], "the guide").name == "experts-only"


def test_makoras_recipe_covers_experts_and_drops_all_but_the_text(qwen36: list[Weight]) -> None:
    counts = parameters(qwen36, "makora-mixfp4")
    assert counts["mixfp4_makora"] == 32_212_254_720 + 125_829_120
    assert counts["drop"] == 446_571_248 + 844_640_768


def test_nvidias_recipe_covers_the_published_classes(qwen36: list[Weight]) -> None:
    counts = parameters(qwen36, "nvidia-nvfp4")
    assert counts["nvfp4"] == 32_212_254_720 + 125_829_120 + 508_559_360
    assert counts["fp8_tensor"] == 503_316_480 + 2 * 251_658_240 + 188_743_680 + 83_886_080


@pytest.mark.parametrize("name", ["nvfp4", "mixfp4"])
def test_head_recipes_add_lm_head_and_nothing_else(name: str, qwen36: list[Weight]) -> None:
    head, plain = 508_559_360, parameters(qwen36, name)
    kept = plain["keep"] - head
    assert parameters(qwen36, f"{name}-head4") == plain | {"keep": kept, name: plain[name] + head}
    assert parameters(qwen36, f"{name}-head8") == plain | {"keep": kept, "q8_0": head}


def test_the_mixed_recipe_has_fp8_in_attention_and_shared_experts(qwen36: list[Weight]) -> None:
    counts = parameters(qwen36, "nvfp4-fp8")
    assert counts["nvfp4"] == 32_212_254_720
    assert counts["fp8_channel"] == 188_743_680 + 83_886_080 + 125_829_120


def test_a_tied_model_without_lm_head_is_no_error(qwen36: list[Weight]) -> None:
    without = [w for w in qwen36 if w.role != "lm_head"]
    assert parameters(without, "nvidia-nvfp4")["nvfp4"] == 32_212_254_720 + 125_829_120


@pytest.mark.parametrize("name", sorted(UD))
def test_the_ud_recipes_follow_the_card_table(name: str, qwen36: list[Weight]) -> None:
    formats: dict[str, set[str | None]] = {}
    for w, d in zip(qwen36, resolve(load_recipe(name), qwen36), strict=True):
        formats.setdefault(w.role, set()).add(d.format)
    four = "mxfp4" if name == "ud-mxfp4" else "affine4_g64"
    assert formats["experts.gate_up"] == formats["attention.q"] == formats["linear_attention.qkv"] == {four}
    assert formats["embedding"] == formats["lm_head"] == formats["router"] == formats["shared_expert_gate"]
    assert formats["router"] == {"affine8_g64"}
    assert formats["attention.o"] == formats["linear_attention.out"] == {None}
