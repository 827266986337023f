from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.checkpoint.inventory import Inventory
from halfbyte.errors import RecipeError
from halfbyte.models import Piece, Weight, family_for
from halfbyte.recipes import Decision, parse_recipe, resolve


def weight(name: str, role: str, shape: tuple[int, ...] = (8, 8), group: str | None = None) -> Weight:
    return Weight(name, role, 0, shape, "BF16", (Piece(name),), group)


def recipe(*lines: str):
    return parse_recipe("name: mine\nrules:\n" + "".join(f"  - {{{line}}}\n" for line in lines), "here")


FUSED = Weight(
    "l.0.experts.gate_up_proj",
    "experts.gate_up",
    0,
    (2, 8, 8),
    "BF16",
    tuple(Piece(f"l.0.experts.{e}.{p}_proj.weight", e) for e in (0, 1) for p in ("gate", "up")),
)
MODEL = [
    weight("embed.weight", "embedding"),
    weight("l.0.q_proj.weight", "attention.q"),
    weight("l.0.in_proj_a.weight", "linear_attention.a"),
    weight("l.0.conv.weight", "linear_attention.conv", (8, 1, 4)),
    weight("l.0.out.weight", "linear_attention.out"),
    FUSED,
    weight("l.0.router.weight", "router"),
    weight("mtp.0.experts.down_proj", "mtp.experts.down", (2, 8, 8)),
    weight("visual.fc.weight", "vision.linear"),
    weight("norm.weight", "norm", (8,)),
]


def chosen(*lines: str) -> list[str]:
    """Names of the weights that a rule selects."""
    decisions = resolve(recipe(*lines), MODEL)
    return [w.name for w, d in zip(MODEL, decisions, strict=True) if d.rule is not None]


def test_decisions_are_in_the_order_of_the_weights() -> None:
    decisions = resolve(recipe("match: experts, format: nvfp4, scale_search: absmax"), MODEL)
    assert decisions[5] == Decision("quantize", "nvfp4", "absmax", "amax", "error", "rule 1 of mine", 1)


def test_weights_that_no_rule_matches_are_kept() -> None:
    decision = resolve(recipe("match: experts, format: nvfp4"), MODEL)[0]
    assert (decision.action, decision.reason, decision.rule) == ("keep", "no rule of the recipe selects it", None)


def test_the_last_match_wins() -> None:
    rules = recipe("match: all, keep: true", "match: linear, format: a", "match: experts, format: b")
    decisions = resolve(rules, MODEL)
    assert [d.format for d in decisions[4:7]] == ["a", "b", None]


def test_a_rule_that_is_overridden_everywhere_is_fine() -> None:
    assert resolve(recipe("match: experts, format: a", "match: experts, format: b"), MODEL)[5].format == "b"


def test_linear_is_the_large_matrices_of_the_main_model() -> None:
    names = ["l.0.q_proj.weight", "l.0.out.weight", "l.0.experts.gate_up_proj"]
    assert chosen("match: linear, format: a") == names


def test_linear_leaves_out_what_has_less_than_two_dimensions() -> None:
    weights = [weight("a", "mlp.up"), weight("b", "mlp.up", (8,))]
    assert [d.action for d in resolve(recipe("match: linear, format: a"), weights)] == ["quantize", "keep"]


def test_a_role_does_not_match_mtp_or_vision() -> None:
    assert chosen("match: experts, format: a") == ["l.0.experts.gate_up_proj"]


def test_mtp_matches_everything_below_it() -> None:
    assert chosen("match: mtp, keep: true") == ["mtp.0.experts.down_proj"]


def test_all_matches_all() -> None:
    assert len(chosen("match: all, keep: true")) == len(MODEL)


def test_a_regex_is_searched_anywhere_in_the_name() -> None:
    assert chosen(r"match: 're:q_proj\.weight$', format: a") == ["l.0.q_proj.weight"]


def test_a_regex_matches_a_fused_weight_by_all_its_sources() -> None:
    assert chosen(r"match: 're:experts\.\d+\.(gate|up)_proj', format: a") == ["l.0.experts.gate_up_proj"]


def test_a_regex_that_matches_only_some_sources_of_a_fused_weight_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"rule 1: .* only 2 of the 4 tensors of l\.0\.experts\.gate_up_proj"):
        resolve(recipe(r"match: 're:experts\.1\.', format: a"), MODEL)


def test_a_rule_that_matches_nothing_names_the_nearest_role() -> None:
    with pytest.raises(
        RecipeError, match=r"recipe mine, rule 2: 'attention.qkv' matches nothing; nearest: attention.q"
    ):
        resolve(recipe("match: all, keep: true", "match: attention.qkv, format: a"), MODEL)


def test_a_rule_that_matches_nothing_names_the_nearest_tensor() -> None:
    with pytest.raises(RecipeError, match=r"nearest: l\.0\.q_proj\.weight"):
        resolve(recipe(r"match: 're:l\.0\.q_prj\.weight', format: a"), MODEL)


def test_every_entry_of_a_list_must_match() -> None:
    with pytest.raises(RecipeError, match="'shared_expert' matches nothing"):
        resolve(recipe("match: [experts, shared_expert], format: a"), MODEL)


def test_an_optional_rule_may_match_nothing() -> None:
    assert chosen("match: mamba, format: a, optional: true") == []


def test_a_class_that_is_already_quantized_is_named() -> None:
    weights = [weight("x.weight_packed", "quantized.experts.down")]
    with pytest.raises(RecipeError, match=r"'experts' matches nothing, because .* already quantized"):
        resolve(recipe("match: experts, format: a"), weights)


GROUP = [weight(f"{x}_proj", f"attention.{x}", group="l.0.qkv_proj") for x in "qkv"]


def test_a_group_with_two_formats_is_refused_by_its_tensors() -> None:
    message = r"splits the fusion group l\.0\.qkv_proj: q_proj gets a \(rule 1\) but v_proj gets b \(rule 2\)"
    with pytest.raises(RecipeError, match=message):
        resolve(recipe("match: linear, format: a", "match: attention.v, format: b"), GROUP)


def test_a_group_that_is_quantized_only_in_part_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"q_proj gets a \(rule 1\) but k_proj gets keep \(no rule\)"):
        resolve(recipe("match: attention.q, format: a"), GROUP)


def test_a_group_with_searches_of_two_tensor_scales_is_refused() -> None:
    rules = "match: linear, format: nvfp4", "match: attention.v, format: nvfp4, scale_search: four_over_six"
    with pytest.raises(
        RecipeError, match=r"v_proj gets nvfp4 by four_over_six \(rule 2\).*same format and global scale"
    ):
        resolve(recipe(*rules), GROUP)
    resolve(recipe("match: linear, format: nvfp4", "match: attention.v, format: nvfp4, scale_search: absmax"), GROUP)


def test_a_group_with_two_tensor_scales_is_refused() -> None:
    with pytest.raises(RecipeError, match="splits the fusion group"):
        rules = recipe("match: linear, format: a", "match: attention.q, format: a, global_scale: power_of_two")
        resolve(rules, GROUP)


def test_a_group_with_one_format_is_fine() -> None:
    assert {d.format for d in resolve(recipe("match: linear, format: a"), GROUP)} == {"a"}


def test_both_spellings_of_experts_get_the_same_decisions(shared: Path) -> None:
    fused = Inventory.from_json(shared / "inventories" / "qwen36_35b_a3b.json")
    weights = family_for(fused.config).weights(fused)
    decisions = resolve(recipe("match: experts, format: a"), weights)
    assert sum(d.action == "quantize" for d in decisions) == 80


def test_a_rotation_is_part_of_the_format() -> None:
    decided = resolve(recipe("match: linear, format: int4, transform: hadamard"), GROUP)
    assert {d.format for d in decided} == {"int4_g128_hadamard"}


def test_a_group_with_rotated_and_plain_weights_is_refused() -> None:
    rules = "match: linear, format: mxfp4", "match: attention.v, format: mxfp4, transform: hadamard"
    with pytest.raises(RecipeError, match="v_proj gets mxfp4_hadamard"):
        resolve(recipe(*rules), GROUP)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("format: fp8_channel, scale_search: absmax, transform: hadamard", "rule 1: fp8_channel cannot be rotated"),
        ("format: mxfp4_hadamard, transform: duquant", "rule 1: mxfp4_hadamard is that of rotated weights already"),
    ],
)
def test_what_cannot_be_rotated_is_refused_with_the_rule(rule: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve(recipe(f"match: linear, {rule}"), GROUP)
