from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.errors import RecipeError
from halfbyte.recipes import list_recipes, load_recipe, parse_recipe

RULE = "rules: [{match: linear, format: nvfp4}]"


def rules(*lines: str) -> str:
    return "name: mine\nrules:\n" + "".join(f"  - {{{line}}}\n" for line in lines)


def test_a_rule_has_defaults() -> None:
    rule = parse_recipe(f"name: mine\n{RULE}", "here").rules[0]
    assert (rule.match, rule.scale_search, rule.global_scale, rule.if_not_divisible) == (
        ("linear",),
        "sweep",
        "amax",
        "error",
    )
    assert rule.action == "quantize" and not rule.optional and rule.reason is None


def test_a_rule_may_ask_for_importance_and_folding() -> None:
    text = "calibration: optional\n" + rules("match: linear, format: nvfp4, error_weight: importance, transform: awq")
    recipe = parse_recipe(text, "here")
    assert (recipe.calibration, recipe.rules[0].error_weight, recipe.rules[0].transform) == (
        "optional",
        "importance",
        "awq",
    )
    assert load_recipe("nvfp4").calibration == "required" and load_recipe("nvfp4").rules[0].error_weight is None


@pytest.mark.parametrize("key", ["error_weight: importance", "transform: awq"])
def test_a_kept_weight_asks_for_nothing(key: str) -> None:
    with pytest.raises(RecipeError, match=f"`{key.split(':')[0]}` has no meaning without `format`"):
        parse_recipe(rules(f"match: linear, keep: true, {key}"), "here")


@pytest.mark.parametrize("key", ["error_weight: hessian", "transform: rotation"])
def test_an_unknown_wish_is_refused(key: str) -> None:
    with pytest.raises(RecipeError, match=f"here, rule 1: {key.split(':')[0]}: Input should be"):
        parse_recipe(rules(f"match: linear, format: nvfp4, {key}"), "here")


def test_importance_of_single_columns_cannot_weigh_rotated_ones() -> None:
    with pytest.raises(RecipeError, match="rule 1: `transform: hadamard` mixes columns"):
        parse_recipe(rules("match: linear, format: mxfp4, transform: hadamard, error_weight: importance"), "here")


def test_only_rotations_by_inputs_need_a_calibration() -> None:
    asks = {t: f"match: linear, format: mxfp4, transform: {t}" for t in ("hadamard", "duquant", "awq")}
    needs = {t: parse_recipe(rules(rule), "here").needs_calibration for t, rule in asks.items()}
    assert needs == {"hadamard": False, "duquant": True, "awq": True}


def test_match_may_be_a_list() -> None:
    recipe = parse_recipe(rules("match: [experts, 're:lm_head'], format: nvfp4"), "here")
    assert recipe.rules[0].match == ("experts", "re:lm_head")


def test_a_file_without_a_name_is_named_as_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(RULE)
    assert load_recipe(path).name == load_recipe(str(path)).name == "mine"


def test_a_file_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"the recipe missing\.yaml cannot be read: No such file"):
        load_recipe("missing.yaml")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"bad\.yaml cannot be read: it is not UTF-8"):
        load_recipe(path)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'mixpf4'; nearest: mixfp4"):
        load_recipe("mixpf4")


@pytest.mark.parametrize("name", ["nvfp4-four-over-six", "nvfp4_four_over_six", "four_over_six", "Four-Over-Six"])
def test_hyphens_underscores_and_aliases_name_a_builtin(name: str) -> None:
    assert load_recipe(name).name == "nvfp4-four-over-six"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "match: linear, format: a, scale_serach: sweep",
            "here, rule 2: unknown key 'scale_serach'; nearest: scale_search",
        ),
        ("match: linear", "exactly one of"),
        ("match: linear, format: a, keep: true", "exactly one of"),
        ("match: linear, keep: false", "rule 2: keep"),
        ("match: linear, drop: true", "must give a `reason`"),
        ("match: linear, drop: true, reason: ' '", "must give a `reason`"),
        ("match: linear, keep: true, scale_search: sweep", "`scale_search` has no meaning without `format`"),
        ("match: linear, format: a, optional: 'yes'", "rule 2: optional"),
        ("match: linear, format: 4", "rule 2: format"),
        ("match: linear, format: a, global_scale: max", "'amax', 'power_of_two' or 'soar'"),
        ("match: [], format: a", "rule 2: match"),
        ("format: a", "rule 2: match: Field required"),
        ("match: expert, format: a", "no role 'expert'; nearest: experts"),
        ("match: 're:(', format: a", "not a valid regular expression"),
    ],
)
def test_a_wrong_rule_is_refused_with_its_number(line: str, message: str) -> None:
    with pytest.raises(RecipeError, match="here, rule 2") as error:
        parse_recipe(rules("match: linear, format: a", line), "here")
    assert message in str(error.value)


def test_a_role_that_does_not_exist_is_refused_even_if_optional() -> None:
    with pytest.raises(RecipeError, match=r"no role 'mtp.expert'"):
        parse_recipe(rules("match: mtp.expert, keep: true, optional: true"), "here")


def test_an_unknown_top_level_key_is_refused() -> None:
    with pytest.raises(RecipeError, match="here: unknown key 'rule'; nearest: rules"):
        parse_recipe("name: x\nrule: []", "here")


def test_a_kv_cache_is_fp8_or_not_spoken_of() -> None:
    rules = "rules: [{match: linear, format: nvfp4}]"
    assert parse_recipe(rules, "t", "t").kv_cache is None
    asking = parse_recipe(f"kv_cache: fp8\n{rules}", "t", "t")
    assert asking.kv_cache == "fp8" and asking.needs_calibration
    with pytest.raises(RecipeError, match="t: kv_cache: Input should be 'fp8'"):
        parse_recipe(f"kv_cache: int8\n{rules}", "t", "t")


@pytest.mark.parametrize("text", ["", "- a", "name: x", "name: x\nrules: []"])
def test_a_recipe_without_rules_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="rules"):
        parse_recipe(text, "here")


def test_a_repeated_key_is_refused() -> None:
    with pytest.raises(RecipeError, match="here: line 3: the key 'format' is already given"):
        parse_recipe("rules:\n- match: linear\n- {format: a, format: b}", "here")


def test_a_message_is_one_sentence_without_library_noise() -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(rules("match: linear, format: 4"), "here")
    assert "\n" not in str(error.value) and "pydantic" not in str(error.value)


def test_builtins_are_listed_with_descriptions() -> None:
    recipes = list_recipes()
    assert list(recipes) == sorted(recipes) and {"nvfp4", "mixfp4", "nvidia-nvfp4"} <= set(recipes)
    assert all(text.endswith(".") for text in recipes.values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("objective: gptq_loss", "`objective: gptq_loss` has no meaning without `rounding: gptq`"),
        ("static_groups: true", "`static_groups` has no meaning without `rounding: gptq`"),
        ("rounding: rtn, order: act", "`order` has no meaning without `rounding: gptq`"),
        ("rounding: gptq, error_weight: importance", "leave `error_weight` out"),
        ("objective: local_hessian, error_weight: importance", "leave `error_weight` out"),
        ("rounding: gptq, objective: gptq_loss, static_groups: true", "leave one of them out"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys: str, message: str) -> None:
    with pytest.raises(RecipeError, match="here, rule 1: .*" + message):
        parse_recipe(rules(f"match: linear, format: nvfp4, {keys}"), "here")


@pytest.mark.parametrize("name", ["q4_k_m", "Q4_K_M", "IQ4_XS", "q5_k_s"])
def test_a_quantization_of_llama_cpp_gets_what_there_is_instead(name: str) -> None:
    with pytest.raises(
        RecipeError, match=r"llama\.cpp's; .*--recipe mxfp4 --for llama\.cpp.*`halfbyte recipes` lists all"
    ):
        load_recipe(name)
