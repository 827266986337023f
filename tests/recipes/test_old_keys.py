from __future__ import annotations

import warnings

import pytest

from halfbyte.errors import RecipeError
from halfbyte.recipes import Rule, parse_recipe


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("search: absmax", {"scale_search": "absmax"}),
        ("tensor_scale: soar", {"global_scale": "soar"}),
        ("indivisible: keep", {"if_not_divisible": "keep"}),
        ("weight: importance", {"error_weight": "importance"}),
        ("weight: none", {"error_weight": "none"}),
        ("weight: local_hessian", {"objective": "local_hessian"}),
        ("method: nearest", {"rounding": "rtn"}),
        ("method: gptq", {"rounding": "gptq"}),
        ("method: gptq, mode: in_loop", {"rounding": "gptq", "objective": "gptq_loss"}),
        ("method: gptq, mode: local_hessian", {"rounding": "gptq", "objective": "local_hessian"}),
        ("method: gptq, mode: compensated", {"rounding": "gptq", "objective": "squared_error"}),
        ("method: gptq, mode: static", {"rounding": "gptq", "static_groups": True}),
    ],
)
def test_a_rule_of_the_release_before_means_what_it_meant(old: str, new: dict[str, object]) -> None:
    recipe = parse_recipe(f"rules: [{{match: linear, format: nvfp4, {old}}}]", "here", "old")
    wanted = Rule.model_validate({"match": "linear", "format": "nvfp4", **new})
    assert recipe.rules[0].model_dump() == wanted.model_dump()


def test_a_recipe_with_old_keys_says_their_new_names() -> None:
    text = "rules: [{match: linear, format: nvfp4, search: absmax, indivisible: keep}, {match: mlp, keep: true}]"
    assert parse_recipe(text, "here", "old").notes == [
        "recipe old uses keys that only this release still reads: `search` is now `scale_search`, `indivisible` is now "
        "`if_not_divisible`"
    ]


def test_a_recipe_of_today_has_nothing_to_note() -> None:
    assert parse_recipe("rules: [{match: linear, format: nvfp4, scale_search: absmax}]", "here", "new").notes == []


@pytest.mark.parametrize(
    ("keys", "twice"),
    [
        ("search: absmax, scale_search: absmax", "scale_search"),
        ("weight: local_hessian, objective: local_hessian", "objective"),
        ("weight: local_hessian, mode: in_loop, method: gptq", "objective"),
    ],
)
def test_a_key_under_its_old_and_its_new_name_is_refused(keys: str, twice: str) -> None:
    with pytest.raises(RecipeError, match=f"here, rule 1: `{twice}` is given twice, once under its old name"):
        parse_recipe(f"rules: [{{match: linear, format: nvfp4, {keys}}}]", "here", "both")


def test_reading_old_keys_raises_no_python_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_recipe("rules: [{match: linear, format: nvfp4, search: absmax}]", "here", "old")
