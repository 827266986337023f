"""Calibrated scales of activations: from statistics into the output, as engines want them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte
from halfbyte.calibration.statistics import Part, new_description, write_description, write_part
from halfbyte.checkpoint import Reader
from halfbyte.demo import MODEL
from halfbyte.errors import PlanError
from halfbyte.recipes import parse_recipe
from halfbyte.source.checkpoint import Checkpoint

W4A4 = parse_recipe("rules: [{match: linear, format: nvfp4, activations: static}]", "t", "t")


def _amax(name: str) -> float:
    return 1 + sum(name.encode()) % 97 / 7


def _statistics(folder: Path, silent: str = "") -> Path:
    part = Part()
    for weight in Checkpoint.open(MODEL).weights:
        if len(weight.shape) < 2 or weight.role.startswith("mtp."):
            continue
        lead = weight.shape[:1] if len(weight.shape) == 3 and "experts" in weight.role else ()
        amax = np.full(lead, 0 if silent and silent in weight.name else _amax(weight.name), np.float32)
        if lead:
            amax[1] = 0  # no token reached this expert
        part.arrays[weight.name] = {
            "count": np.ones(lead, np.int64),
            "squares": np.ones((*lead, weight.shape[-1])),
            "amax": amax,
        }
    folder.mkdir()
    write_part(folder, "all", part)
    write_description(folder, new_description(texts=[], samples=1, tokens=1, parts=["all"]) | {"complete": True})
    return folder


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _statistics(tmp_path_factory.mktemp("s") / "s")


def _scales(folder: Path, ending: str) -> dict[str, np.ndarray[Any, Any]]:
    inventory = halfbyte.Inventory.open(folder)
    with Reader(inventory) as reader:
        return {n.removesuffix(ending): reader.read(n) for n in inventory.tensors if n.endswith(ending)}


def test_the_largest_input_reaches_the_top_of_the_range(statistics: Path, tmp_path: Path) -> None:
    for dialect in ("compressed-tensors", "modelopt"):
        halfbyte.quantize(halfbyte.plan(MODEL, W4A4, dialect=dialect, importance=statistics), tmp_path / dialect)
    ours = _scales(tmp_path / "compressed-tensors", ".input_global_scale")
    theirs = _scales(tmp_path / "modelopt", ".input_scale")
    name = "model.layers.3.self_attn.o_proj"
    assert ours[name].shape == (1,) and theirs[name].shape == ()
    np.testing.assert_allclose(1 / ours[name], _amax(f"{name}.weight") / (6 * 448), rtol=1e-6)
    np.testing.assert_allclose(theirs[name], _amax(f"{name}.weight") / (6 * 448), rtol=1e-6)
    assert halfbyte.verify(tmp_path / "compressed-tensors", MODEL).ok
    assert halfbyte.verify(tmp_path / "modelopt", MODEL).ok


@pytest.mark.parametrize("fmt", ["fp8_tensor", "fp8_channel"])
def test_the_largest_input_becomes_the_largest_fp8_number(statistics: Path, fmt: str) -> None:
    recipe = parse_recipe(f"rules: [{{match: linear, format: {fmt}, activations: static}}]", "t", "t")
    plan = halfbyte.plan(MODEL, recipe, dialect="compressed-tensors", importance=statistics)
    constants = {o.name: o.constant for item in plan.items for o in item.outputs}
    name = "model.layers.3.self_attn.o_proj"
    assert constants[f"{name}.input_scale"] == pytest.approx((_amax(f"{name}.weight") / 448,), rel=1e-6)


def test_fused_projections_and_experts_of_a_layer_share_a_scale_and_none_is_zero(
    statistics: Path, tmp_path: Path
) -> None:
    halfbyte.quantize(halfbyte.plan(MODEL, W4A4, dialect="modelopt", importance=statistics), tmp_path / "out")
    found = _scales(tmp_path / "out", ".input_scale")
    attention = [float(found[f"model.layers.3.self_attn.{p}_proj"]) for p in "qkv"]
    assert len(set(attention)) == 1
    experts = [float(v) for n, v in found.items() if "layers.0.mlp.experts." in n and "down" not in n]
    assert len(experts) == 32 and len(set(experts)) == 1
    assert all(value > 0 for value in found.values())


def test_the_configuration_says_that_activations_are_quantized(statistics: Path) -> None:
    plan = halfbyte.plan(MODEL, W4A4, dialect="compressed-tensors", importance=statistics)
    assert plan.config is not None
    groups = json.loads(plan.config)["quantization_config"]["config_groups"].values()
    assert {group["input_activations"]["dynamic"] for group in groups} == {"local"}


def test_static_activations_without_statistics_are_refused() -> None:
    with pytest.raises(PlanError, match=r"calibrated scales \(static\), .*\(--calibration\)"):
        halfbyte.plan(MODEL, W4A4, dialect="modelopt")


def test_inputs_of_zeros_alone_are_refused(tmp_path: Path) -> None:
    folder = _statistics(tmp_path / "s", silent="o_proj")
    with pytest.raises(PlanError, match=r"o_proj.weight: the calibration saw no input other than zero"):
        halfbyte.plan(MODEL, W4A4, dialect="modelopt", importance=folder)


def test_scales_and_folding_are_not_combined(statistics: Path) -> None:
    both = parse_recipe("rules: [{match: linear, format: nvfp4, activations: static, transform: awq}]", "t", "t")
    with pytest.raises(PlanError, match="AWQ"):
        halfbyte.plan(MODEL, both, dialect="modelopt", importance=statistics)
