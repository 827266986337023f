"""What a recipe asks of activations, and what becomes of what a source says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.checkpoint import Inventory
from halfbyte.dialects import get_dialect
from halfbyte.errors import PlanError, RecipeError
from halfbyte.plan.build import make_plan
from halfbyte.recipes import Recipe, parse_recipe
from halfbyte.source.checkpoint import Checkpoint
from small_models import DENSE_CONFIG, dense_tensors, linear, read_file, recipe, run, write_checkpoint

CT = "compressed-tensors"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "dense", dense_tensors(), DENSE_CONFIG)


@pytest.fixture
def calibrated(dense: Path, tmp_path: Path) -> Path:
    """NVFP4 with a calibrated scale for the activations of every module, as published W4A4 checkpoints have."""
    run(dense, tmp_path / "weights", linear("nvfp4"), CT)
    tensors = read_file(tmp_path / "weights")
    for name in [name for name in tensors if name.endswith("weight_global_scale")]:
        tensors[name.replace("weight_global", "input_global")] = np.array([448 * 6 / 3.0], np.float32)
    config = json.loads((tmp_path / "weights" / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = {**group["weights"], "dynamic": "local"}
    return write_checkpoint(tmp_path / "calibrated", tensors, config)


def inputs_of(source: Path, what: Recipe, dialect: str = CT) -> list[Any]:
    """``input_activations`` of every config group of a planned output."""
    config = make_plan(Checkpoint.open(source), what, dialect).config
    assert config is not None
    return [group["input_activations"] for group in json.loads(config)["quantization_config"]["config_groups"].values()]


@pytest.mark.parametrize(
    ("fmt", "kind", "preset"),
    [
        ("nvfp4", "none", "NVFP4A16"),
        ("nvfp4", None, "NVFP4A16"),
        ("mxfp4", "dynamic", "MXFP4"),
        ("mxfp4", None, "MXFP4A16"),
        ("int4_g128", None, "W4A16"),
        ("int4_asym_g128", "none", "W4A16_ASYM"),
        ("fp8_channel", "dynamic", "FP8_DYNAMIC"),
        ("fp8_channel", None, "FP8_DYNAMIC"),
        ("fp8_block128", "dynamic", "FP8_BLOCK"),
        ("mxfp8", "dynamic", "MXFP8"),
        ("mxfp8", None, "MXFP8A16"),
    ],
)
def test_schemes_are_the_presets_of_the_library(dense: Path, fmt: str, kind: str | None, preset: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    what = linear(fmt, **({"activations": kind} if kind else {}))
    config = make_plan(Checkpoint.open(dense), what, CT).config
    assert config is not None
    parsed = QuantizationConfig.model_validate(json.loads(config)["quantization_config"])
    (group,) = parsed.config_groups.values()
    expected = preset_name_to_scheme(preset, ["Linear"])
    assert group.weights.model_dump() == expected.weights.model_dump()
    found, wanted = (args and args.model_dump() for args in (group.input_activations, expected.input_activations))
    assert found == wanted


def test_a_source_with_calibrated_scales_gives_the_preset_nvfp4(calibrated: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    (stated,) = inputs_of(calibrated, linear("nvfp4", activations="static"))
    expected = preset_name_to_scheme("NVFP4", ["Linear"]).input_activations
    assert QuantizationArgs.model_validate(stated).model_dump(exclude={"observer"}) == expected.model_dump(
        exclude={"observer"}
    )


def test_w4a4_without_calibrated_scales_is_refused(dense: Path) -> None:
    with pytest.raises(PlanError, match=r"calibrated scales \(static\), but there is no .*q_proj\.input_global_scale"):
        make_plan(Checkpoint.open(dense), linear("nvfp4", activations="static"), CT)


@pytest.mark.parametrize(("fmt", "kind"), [("nvfp4", "dynamic"), ("mxfp4", "static"), ("int4_g32", "dynamic")])
def test_what_engines_have_no_kernel_for_is_refused(dense: Path, fmt: str, kind: str) -> None:
    with pytest.raises(PlanError, match=f"engines take no {kind} activations beside {fmt}"):
        make_plan(Checkpoint.open(dense), linear(fmt, activations=kind), CT)


def test_a_dialect_without_quantized_activations_refuses_them_and_takes_none(dense: Path) -> None:
    with pytest.raises(PlanError, match="engines of this dialect take no dynamic activations beside mxfp4"):
        make_plan(Checkpoint.open(dense), linear("mxfp4", activations="dynamic"), "halfbyte")
    assert make_plan(Checkpoint.open(dense), linear("mxfp4", activations="none"), "halfbyte").items


def test_calibrated_scales_are_left_out_where_a_recipe_wants_weights_only(calibrated: Path, tmp_path: Path) -> None:
    plan = run(calibrated, tmp_path / "out", linear("nvfp4", activations="none"), CT)
    assert not [name for name in Inventory.open(tmp_path / "out").tensors if "input" in name.rpartition(".")[2]]
    assert any("scales of activations are left out (14)" in note for note in plan.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert [group["input_activations"] for group in config["config_groups"].values()] == [None]


def test_modelopt_takes_static_activations_from_a_source_that_has_them(calibrated: Path, tmp_path: Path) -> None:
    run(calibrated, tmp_path / "out", linear("nvfp4", activations="static"), "modelopt")
    names = Inventory.open(tmp_path / "out").tensors
    assert len([name for name in names if name.endswith(".input_scale")]) == 14
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "NVFP4"


def test_what_a_source_says_of_activations_stays_where_its_weights_keep_their_format(
    dense: Path, tmp_path: Path
) -> None:
    run(dense, tmp_path / "a", recipe({"match": "attention", "format": "mxfp4", "activations": "dynamic"}), CT)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (stated,) = (g["input_activations"] for g in config["quantization_config"]["config_groups"].values())
    assert stated["dynamic"] is True
    other = recipe({"match": "mlp", "format": "int4_g32", "scale_search": "absmax"})
    assert sorted(map(str, inputs_of(tmp_path / "a", other))) == sorted(map(str, [stated, None]))
    # requantized weights begin anew
    assert inputs_of(tmp_path / "a", linear("int4_g32")) == [None]


def test_arguments_that_no_recipe_can_ask_for_are_kept_to_the_letter(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "a", linear("int4_g128"), CT)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    token = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = token  # the preset W4AFP8
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    assert inputs_of(tmp_path / "a", linear("int4_g128")) == [token]


def test_one_format_with_two_kinds_of_activations_becomes_two_groups(dense: Path) -> None:
    what = recipe(
        {"match": "attention", "format": "mxfp4", "activations": "dynamic"},
        {"match": "mlp", "format": "mxfp4", "activations": "none"},
    )
    assert [bool(stated) for stated in inputs_of(dense, what)] == [True, False]


def test_matrices_that_engines_fuse_have_one_kind_of_activations(dense: Path) -> None:
    what = recipe(
        {"match": "attention", "format": "mxfp4"},
        {"match": "attention.q", "format": "mxfp4", "activations": "dynamic"},
    )
    with pytest.raises(RecipeError, match="splits the fusion group"):
        make_plan(Checkpoint.open(dense), what, CT)


@pytest.mark.parametrize("rule", ["keep: true", "format: mxfp4, activations: sometimes"])
def test_a_rule_says_a_known_kind_beside_a_format(rule: str) -> None:
    activations = "" if "activations" in rule else ", activations: none"
    with pytest.raises(RecipeError, match="activations"):
        parse_recipe(f"name: x\nrules:\n  - {{match: linear, {rule}{activations}}}\n", "x.yaml")


def test_every_format_of_compressed_tensors_has_a_usual_kind() -> None:
    from halfbyte.dialects.compressed_tensors_config import SCHEMES, activation_arguments

    for name, (_, _, kinds) in SCHEMES.items():
        assert "none" in kinds, name
        assert activation_arguments(name, None, False) == next(iter(kinds.values()))
    assert get_dialect(CT).name == CT
