"""Recipes that say ``global_scale: soar``: conversions fit what the pure function fits, however they are cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from folded import importance_of, plan_with
from halfbyte.calibration import calibration_of
from halfbyte.checkpoint import Reader
from halfbyte.convert.conversion import convert
from halfbyte.errors import PlanError, RecipeError
from halfbyte.formats import QuantizedTensor
from halfbyte.plan import resources as slices
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.recipes import Recipe
from halfbyte.search import encode
from halfbyte.search.soar import soar_global_scale
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from small_models import (
    DENSE_CONFIG,
    MOE_CONFIG,
    dense_tensors,
    hashes,
    linear,
    moe_tensors,
    recipe,
    run,
    write_checkpoint,
)

TEXT = "model.language_model.layers.1."
GROUPS = [
    [f"{TEXT}self_attn.{p}_proj.weight" for p in "qkv"],
    [f"{TEXT}mlp.shared_expert.{p}_proj.weight" for p in ("gate", "up")],
    [f"{TEXT}mlp.experts.gate_up_proj"],
    [f"{TEXT}mlp.experts.down_proj"],
]
# the sweep has nothing to gain, absmax has
FITTED = linear("nvfp4", global_scale="soar")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "dense", dense_tensors(), DENSE_CONFIG)


def arrays(folder: Path, names: list[str]) -> list[np.ndarray]:
    checkpoint = Checkpoint.open(folder)
    weights = {w.name: w for w in checkpoint.weights}
    with Reader(checkpoint.inventory) as reader:
        return [checkpoint.read(reader, weights[name]) for name in names]


def tensors(folder: Path, names: list[str]) -> list[QuantizedTensor]:
    checkpoint = Checkpoint.open(folder)
    weights = {w.name: w for w in checkpoint.weights}
    with Reader(checkpoint.inventory) as reader:
        return [checkpoint.read_quantized(reader, weights[name]) for name in names]


def fitted_weights(plan: Plan) -> Iterator[str]:
    return (item.weight.name for item in plan.items if item.fitted)


@pytest.mark.parametrize("dialect", ["halfbyte", "modelopt", "compressed-tensors"])
def test_the_scale_is_the_one_that_the_function_finds_on_the_whole_weights(
    moe: Path, tmp_path: Path, dialect: str
) -> None:
    """Of a fusion group and of each expert; a stored reciprocal is fitted as the number that decoding divides by."""
    run(moe, tmp_path / "out", FITTED, dialect)
    changed = 0
    for names in GROUPS:
        weights = arrays(moe, names)
        global_scale_inv = dialect == "compressed-tensors"
        found = soar_global_scale(weights, "nvfp4", "absmax", global_scale_inv=global_scale_inv)
        changed += min(found.errors) < found.errors[0]
        for weight, mine in zip(weights, tensors(tmp_path / "out", names), strict=True):
            fitted = found.global_scale
            scale: Any = {"global_scale_inv": 1 / fitted} if global_scale_inv else {"global_scale": fitted}
            expected = encode(weight, "nvfp4", "absmax", **scale)
            stored = mine.global_scale_inv if global_scale_inv else mine.global_scale
            np.testing.assert_array_equal(
                stored, expected.global_scale_inv if global_scale_inv else expected.global_scale
            )
            np.testing.assert_array_equal(mine.codes, expected.codes)
            np.testing.assert_array_equal(mine.scales, expected.scales)
    assert changed == len(GROUPS)
    assert verify(tmp_path / "out", moe).problems == []


@pytest.mark.parametrize("search", ["absmax", "four_over_six", "sweep"])
def test_no_group_is_worse_than_with_the_scale_of_amax(moe: Path, tmp_path: Path, search: str) -> None:
    errors: list[dict[str, float]] = []
    for scale in ("soar", "amax"):
        rule = {"match": "linear", "format": "mixfp4" if search == "sweep" else "nvfp4", "scale_search": search}
        plan = make_plan(Checkpoint.open(moe), recipe(rule | {"global_scale": scale}))
        found: dict[str, float] = {}
        group = {item.weight.name: item.weight.group or item.weight.name for item in plan.items}
        for error in convert(plan, tmp_path / scale, threads=1).errors:
            found[group[error.name]] = found.get(group[error.name], 0.0) + error.squared_error
        errors.append(found)
    fitted, plain = errors
    assert all(fitted[name] <= plain[name] * (1 + 1e-12) for name in plain)
    assert sum(fitted.values()) < sum(plain.values()) or search == "sweep"


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["halfbyte", "compressed-tensors"])
def test_the_bytes_depend_neither_on_threads_nor_on_memory(
    moe: Path, tmp_path: Path, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole units, slices that are held, and slices that are read again for every step."""
    plan = make_plan(Checkpoint.open(moe), FITTED, dialect)
    convert(plan, tmp_path / "whole", 1)
    for size in (512, 3000):
        monkeypatch.setattr(slices, "SLICE_BYTES", size)
        for threads, memory in ((1, 1), (3, 1), (3, 1 << 30)):
            out = tmp_path / f"{size}-{threads}-{memory}"
            convert(plan, out, threads, memory=memory)
            assert hashes(out) == hashes(tmp_path / "whole")


def test_the_bytes_do_not_depend_on_an_interruption(moe: Path, tmp_path: Path) -> None:
    done = 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if done > 300_000:
            raise KeyboardInterrupt

    plan = make_plan(Checkpoint.open(moe), FITTED, max_shard_bytes=50_000)
    convert(plan, tmp_path / "whole", 1)
    with pytest.raises(KeyboardInterrupt):
        convert(plan, tmp_path / "out", 2, stop)
    assert convert(plan, tmp_path / "out", 2).resumed_shards > 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_importance_weighs_what_is_fitted(dense: Path, tmp_path: Path) -> None:
    names = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
    what = recipe({"match": "linear", "format": "nvfp4", "scale_search": "four_over_six", "global_scale": "soar"})
    convert(plan_with(dense, what), tmp_path / "out")
    importance = importance_of(dense).values[names[0]]
    found = soar_global_scale(arrays(dense, names), "nvfp4", "four_over_six", importance)
    assert {float(t.global_scale) for t in tensors(tmp_path / "out", names)} == {float(found.global_scale)}
    assert found.global_scale != soar_global_scale(arrays(dense, names), "nvfp4", "four_over_six").global_scale


def test_groups_that_have_importance_only_in_part_are_fitted_without(dense: Path, tmp_path: Path) -> None:
    names = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
    what = recipe({"match": "linear", "format": "nvfp4", "scale_search": "four_over_six", "global_scale": "soar"})
    checkpoint, some = Checkpoint.open(dense), importance_of(dense)
    del some.values[names[1]], some.counts[names[1]]
    plan = make_plan(checkpoint, what, calibration=calibration_of(some, checkpoint.weights))
    convert(plan, tmp_path / "out")
    found = soar_global_scale(arrays(dense, names), "nvfp4", "four_over_six")
    assert {float(t.global_scale) for t in tensors(tmp_path / "out", names)} == {float(found.global_scale)}


@pytest.mark.slow
@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_folded_weights_are_fitted_as_they_are_folded(
    moe: Path, tmp_path: Path, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = linear("nvfp4", global_scale="soar", transform="awq")
    convert(plan_with(moe, what), tmp_path / "whole", 1)
    monkeypatch.setattr(slices, "SLICE_BYTES", 1024)
    errors = convert(plan_with(moe, what), tmp_path / "out", 3, memory=memory).errors
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert verify(tmp_path / "out", moe).problems == []
    plain = convert(plan_with(moe, linear("nvfp4", transform="awq")), tmp_path / "amax", 3).errors
    assert sum(e.squared_error for e in errors) < sum(e.squared_error for e in plain)


def test_weights_of_zero_are_converted(tmp_path: Path) -> None:
    content = moe_tensors()
    content[f"{TEXT}mlp.experts.down_proj"][1] = 0
    content[f"{TEXT}self_attn.o_proj.weight"][:] = 0
    source = write_checkpoint(tmp_path / "source", content, MOE_CONFIG)
    run(source, tmp_path / "out", FITTED)
    assert verify(tmp_path / "out", source).problems == []
    assert tensors(tmp_path / "out", [f"{TEXT}mlp.experts.down_proj"])[0].decode()[1].any() == np.False_


@pytest.mark.parametrize("fmt", ["mxfp4", "int4_g32", "fp8_tensor", "hif4", "nvfp4_unscaled"])
def test_formats_without_a_tensor_scale_are_refused(moe: Path, fmt: str) -> None:
    what = recipe({"match": "linear", "format": fmt, "global_scale": "soar", "if_not_divisible": "keep"})
    with pytest.raises(RecipeError, match=rf"rule 1 .*`global_scale: soar`.*{fmt} has no global scale to fit"):
        make_plan(Checkpoint.open(moe), what)


def test_a_dialect_that_stores_powers_of_two_is_refused(moe: Path) -> None:
    with pytest.raises(PlanError, match=r"rule 1 .*`global_scale: soar`.*mlx stores only powers of two"):
        make_plan(Checkpoint.open(moe), FITTED, "mlx")


def test_a_group_that_is_fitted_only_in_part_is_refused(dense: Path) -> None:
    part = {"match": "attention.q", "format": "nvfp4"}
    with pytest.raises(RecipeError, match="splits the fusion group"):
        make_plan(Checkpoint.open(dense), recipe({**part, "match": "linear", "global_scale": "soar"}, part))


def test_the_plan_says_so_and_is_another_one(dense: Path, tmp_path: Path) -> None:
    fitted, plain = (make_plan(Checkpoint.open(dense), what) for what in (FITTED, linear("nvfp4")))
    assert fitted.fingerprint != plain.fingerprint
    assert f"global scales of {len(list(fitted_weights(fitted)))} weights are fitted" in " ".join(fitted.notes)
    assert not any("fitted" in note for note in plain.notes)
    told = json.loads(fitted.provenance)["recipe"]
    again = make_plan(Checkpoint.open(dense), Recipe.model_validate_json(json.dumps(told)))
    assert again.fingerprint == fitted.fingerprint
    assert fitted.resources().memory >= plain.resources().memory


def test_codes_of_a_source_in_the_same_format_are_kept(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "a", linear("nvfp4"), "modelopt")
    plan = run(tmp_path / "a", tmp_path / "b", FITTED, "halfbyte")
    assert {item.action for item in plan.items if item.fitted} == {"transcode"}
    for names in GROUPS:
        for one, other in zip(tensors(tmp_path / "a", names), tensors(tmp_path / "b", names), strict=True):
            np.testing.assert_array_equal(one.codes, other.codes)
            np.testing.assert_array_equal(one.global_scale, other.global_scale)
