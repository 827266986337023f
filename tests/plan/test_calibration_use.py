"""What recipes make of an importance file, decided and said in the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from folded import importance_of, plan_with
from halfbyte.calibration import Importance, calibration_of
from halfbyte.convert.conversion import convert
from halfbyte.demo import MODEL
from halfbyte.errors import CheckpointError, PlanError, RecipeError
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.recipes import Recipe, load_recipe
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from invented import invented_statistics
from small_models import (
    DENSE_CONFIG,
    MOE_CONFIG,
    dense_tensors,
    hashes,
    linear,
    moe_tensors,
    read_file,
    recipe,
    run,
    write_checkpoint,
)

SWEEP = recipe({"match": "linear", "format": "nvfp4"})


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "dense", dense_tensors(), DENSE_CONFIG)


def weighted(plan: Plan) -> set[str]:
    return {item.weight.name for item in plan.items if item.weighted}


def planned(source: Path, what: Recipe, importance: Importance | None) -> Plan:
    checkpoint = Checkpoint.open(source)
    known = None if importance is None else calibration_of(importance, checkpoint.weights)
    return make_plan(checkpoint, what, calibration=known)


def note(plan: Plan, start: str) -> str:
    return next((entry for entry in plan.notes if entry.startswith(start)), "")


def without(importance: Importance, *endings: str) -> Importance:
    keep = {name: a for name, a in importance.values.items() if not name.endswith(endings)}
    return Importance(keep, {name: importance.counts[name] for name in keep})


def test_a_recipe_that_says_nothing_weighs_every_search_with_a_choice(moe: Path) -> None:
    plan = plan_with(moe, SWEEP)
    quantized = {item.weight.name for item in plan.items if item.action == "quantize"}
    assert weighted(plan) == quantized and not plan.smoothings
    assert note(plan, "importance") == f"importance weights the errors of {len(quantized)} of {len(quantized)} searches"


def test_weights_are_weighted_in_the_output(moe: Path, tmp_path: Path) -> None:
    convert(plan_with(moe, SWEEP), tmp_path / "weighted")
    run(moe, tmp_path / "plain", SWEEP)
    one, other = read_file(tmp_path / "weighted"), read_file(tmp_path / "plain")
    changed = {name.rpartition("_")[0] for name in one if one[name].tobytes() != other[name].tobytes()}
    assert len(changed) > 15 and all("proj" in name for name in changed)
    assert verify(tmp_path / "weighted", moe).ok


def test_weighted_bytes_depend_neither_on_threads_nor_on_memory(moe: Path, tmp_path: Path) -> None:
    for name, threads, memory in (("a", 1, None), ("b", 3, 1 << 22)):
        convert(plan_with(moe, SWEEP), tmp_path / name, threads, memory=memory)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_a_rule_can_leave_importance_out(moe: Path) -> None:
    what = recipe(
        {"match": "linear", "format": "nvfp4"}, {"match": "experts", "format": "nvfp4", "error_weight": "none"}
    )
    assert weighted(plan_with(moe, what)) and not any("experts." in name for name in weighted(plan_with(moe, what)))


def test_a_search_without_a_choice_is_not_weighted(moe: Path) -> None:
    what = recipe(
        {"match": "linear", "format": "nvfp4"},
        {"match": "attention", "format": "fp8_tensor", "scale_search": "sweep"},
        {"match": "linear_attention", "keep": True},
        {"match": "shared_expert", "format": "nvfp4", "scale_search": "absmax"},
    )
    names = weighted(plan_with(moe, what))
    assert names and all(".mlp.experts." in name for name in names)


def test_an_importance_file_that_changes_nothing_is_refused(moe: Path) -> None:
    with pytest.raises(PlanError, match=r"changes nothing with recipe test.*`scale_search: sweep`"):
        plan_with(moe, linear("nvfp4"))


@pytest.mark.parametrize(("key", "value"), [("error_weight", "importance"), ("transform", "awq")])
def test_a_recipe_that_needs_importance_is_refused_without(moe: Path, key: str, value: str) -> None:
    with pytest.raises(RecipeError, match=rf"rule 1 of recipe test says `{key}: {value}`.*--importance FILE"):
        planned(moe, linear("nvfp4", **{key: value}), None)


def test_an_optional_wish_is_left_out_and_said(moe: Path) -> None:
    told = linear("nvfp4", error_weight="importance", transform="awq").model_dump()
    plan = planned(moe, Recipe.model_validate({**told, "calibration": "optional"}), None)
    assert plan.notes == ["without a calibration, AWQ smoothing and weighting of errors of test are left out"]


def test_weights_without_importance_are_named(dense: Path) -> None:
    some = without(importance_of(dense), "down_proj.weight")
    plan = planned(dense, SWEEP, some)
    assert note(plan, "no importance") == (
        "no importance for 2 (such as model.layers.0.mlp.down_proj.weight): plain squared error"
    )
    assert plan.summary()["importance"]["unweighted"] == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]


def test_embeddings_have_no_input_and_need_no_importance(dense: Path) -> None:
    plan = plan_with(dense, recipe({"match": ["linear", "embedding"], "format": "nvfp4"}))
    assert plan.summary()["importance"]["unweighted"] == [] and "model.embed_tokens.weight" not in weighted(plan)


def test_entries_that_fit_no_weight_are_named(dense: Path) -> None:
    more = importance_of(dense)
    more.values["odd"], more.counts["odd"] = np.ones(3, np.float32), np.asarray(1)
    assert note(planned(dense, SWEEP, more), "entries") == "entries of the importance file that fit no weight here: odd"


def test_experts_that_no_token_reached_are_counted(moe: Path) -> None:
    some = importance_of(moe)
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    some.counts[name][1:3] = 0
    plan = planned(moe, SWEEP, some)
    assert note(plan, "no token") == f"no token reached 2 experts of {name}: plain squared error for these"
    assert plan.summary()["importance"]["no_data"] == {name: [1, 2]}


def test_another_models_file_is_refused(moe: Path, dense: Path) -> None:
    checkpoint = Checkpoint.open(moe)
    with pytest.raises(PlanError, match="fits no weight of this checkpoint"):
        calibration_of(without(importance_of(dense), "lm_head.weight"), checkpoint.weights)
    wrong = importance_of(moe)
    first = next(iter(wrong.values))
    wrong.values[first] = wrong.values[first][..., :7]
    with pytest.raises(CheckpointError, match="made for another model"):
        calibration_of(wrong, checkpoint.weights)


def test_what_is_folded_and_what_is_not_is_said_with_the_reason(dense: Path) -> None:
    plan = plan_with(dense, linear("nvfp4", transform="awq"))
    told = plan.summary()["importance"]
    assert told["folds"] == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    assert note(plan, "AWQ: ").startswith("AWQ: 2 groups of weights may be smoothed")
    # this small model has no norm before its MLP
    assert [(entry["reason"], len(entry["weights"])) for entry in told["not_folded"]] == [
        ("model.layers.0.mlp.gate_proj.weight in the same layer reads an input that is not known", 6),
        ("no norm is known to feed it", 4),
        ("nothing before it can be divided", 2),
    ]
    assert plan.notes[-1] == (
        "AWQ: 2 (such as model.layers.0.self_attn.o_proj.weight) not smoothed: nothing before it can be divided"
    )


def test_a_source_that_is_quantized_is_not_folded(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "fp8", linear("fp8_block128"), "fp8")
    with pytest.raises(PlanError, match="changes nothing"):
        plan_with(tmp_path / "fp8", linear("nvfp4", transform="awq"))


def test_a_group_whose_importance_is_unknown_is_not_folded(dense: Path) -> None:
    plan = planned(
        dense, linear("nvfp4", transform="awq"), without(importance_of(dense), "layers.0.mlp.down_proj.weight")
    )
    told = plan.summary()["importance"]
    assert told["folds"] == ["model.layers.1.mlp.up_proj.weight"]
    unknown = {"reason": "the importance file says nothing of it", "weights": ["model.layers.0.mlp.down_proj.weight"]}
    assert unknown in told["not_folded"]


def test_the_fingerprint_knows_the_importance(dense: Path) -> None:
    prints = {plan_with(dense, SWEEP, seed=seed).fingerprint for seed in (0, 1)}
    assert len(prints | {planned(dense, SWEEP, None).fingerprint}) == 3
    assert plan_with(dense, SWEEP).fingerprint in prints


def test_provenance_names_the_file_and_its_digest(dense: Path) -> None:
    told: dict[str, Any] = json.loads(plan_with(dense, SWEEP).provenance)
    assert set(told["importance"]) == {"name", "digest"} and len(told["importance"]["digest"]) == 64
    assert told["folds"] is None


@pytest.mark.parametrize("name", ["ud-mxfp4", "ud-q4"])
def test_dynamic_recipes_fold_where_an_importance_file_is_given(moe: Path, tmp_path: Path, name: str) -> None:
    plan = plan_with(moe, load_recipe(name))
    assert len(plan.smoothings) == 8 and weighted(plan)
    convert(plan, tmp_path / "out")
    assert verify(tmp_path / "out", moe).problems == []
    assert "left out" in planned(moe, load_recipe(name), None).notes[-1]


@pytest.mark.parametrize("hessians", [True, False])
def test_rounding_with_hessians_needs_statistics_that_hold_them(tmp_path: Path, hessians: bool) -> None:
    folder = invented_statistics(tmp_path / "s", hessians=hessians)
    checkpoint = Checkpoint.open(MODEL)
    known = calibration_of(folder, checkpoint.weights)
    what = recipe({"match": "linear", "format": "nvfp4", "rounding": "gptq"})
    if hessians:
        use = make_plan(checkpoint, what, calibration=known).calibration_use
        assert use is not None and (len(use.rounded), len(use.unrounded)) == (21, 12)
        return
    with pytest.raises(RecipeError, match=r"rule 1 of recipe test says `rounding: gptq`, but s holds no Hessians"):
        make_plan(checkpoint, what, calibration=known)
    optional = what.model_copy(update={"calibration": "optional"})
    notes = make_plan(checkpoint, optional, calibration=known).notes
    assert any("33 of 33 weights (100%) that the recipe wants rounded with Hessians have none" in n for n in notes)
