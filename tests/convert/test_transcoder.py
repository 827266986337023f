"""Quantized sources: what keeps every value, what keeps its codes, what is requantized; and verify's proof of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from halfbyte.checkpoint import Inventory, Reader
from halfbyte.errors import CheckpointError
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from quantized_sources import EXPERTS_INT4, GPT_OSS, carried, gpt_oss, kimi, proven, settings_of, tensors_of, values
from small_models import (
    DENSE_CONFIG,
    MOE_CONFIG,
    dense_tensors,
    linear,
    moe_tensors,
    read_file,
    recipe,
    run,
    without_checksums,
    write_checkpoint,
)

LOSSLESS = "lossless: the same codes and scales"
KEEP_ALL = recipe({"match": "all", "keep": True})


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "source", moe_tensors(), MOE_CONFIG)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "source", dense_tensors(), DENSE_CONFIG)


FORMATS = ["int4_g32", "int4_asym_g32", "mxfp4", "mxfp8", "fp8_channel", "fp8_block128"]


@pytest.mark.parametrize("fmt", FORMATS)
def test_there_and_back_again_gives_identical_bytes(moe: Path, tmp_path: Path, fmt: str) -> None:
    run(moe, tmp_path / "a", linear(fmt), "compressed-tensors")
    plan, results = carried(tmp_path / "a", tmp_path / "b", linear(fmt), "halfbyte")
    assert {item.reason for item in plan.items if item.format} == {LOSSLESS}
    assert {item.action for item in plan.items if item.format} == {"transcode"}
    assert results and all(result.lossless for result in results)
    proven(tmp_path / "b", tmp_path / "a", len(results))
    run(tmp_path / "b", tmp_path / "c", linear(fmt), "compressed-tensors")
    assert tensors_of(tmp_path / "c") == tensors_of(tmp_path / "a")
    assert settings_of(tmp_path / "c") == settings_of(tmp_path / "a")


@pytest.mark.parametrize("dialect", ["compressed-tensors", "halfbyte", "modelopt"])
def test_the_same_dialect_copies_a_format_with_a_tensor_scale(moe: Path, tmp_path: Path, dialect: str) -> None:
    run(moe, tmp_path / "a", linear("nvfp4"), dialect)
    _, results = carried(tmp_path / "a", tmp_path / "b", linear("nvfp4", scale_search="sweep"), dialect)
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "b")
    proven(tmp_path / "b", tmp_path / "a", len(results))


RECIPROCAL = "the same codes and block scales; the global scale becomes its reciprocal, rounded to FP32"


@pytest.mark.parametrize(("fmt", "dialect"), [("nvfp4", "modelopt"), ("nvfp4", "halfbyte"), ("mixfp4", "halfbyte")])
def test_a_tensor_scale_that_becomes_its_reciprocal_changes_values_by_a_rounding(
    moe: Path, tmp_path: Path, fmt: str, dialect: str
) -> None:
    run(moe, tmp_path / "a", linear(fmt), "compressed-tensors")
    plan, results = carried(tmp_path / "a", tmp_path / "b", linear(fmt), dialect)
    assert {item.reason for item in plan.items if item.format} == {RECIPROCAL}
    assert not any(result.requantized for result in results)
    assert all((result.max_relative == 0) == result.lossless for result in results)
    assert 0 < max(result.max_relative for result in results) < 2**-21
    before, after = (parts(folder) for folder in (tmp_path / "a", tmp_path / "b"))
    for name, (codes, scales, global_scale_inv) in before.items():
        assert np.array_equal(codes, after[name][0]) and np.array_equal(scales, after[name][1])
        assert np.array_equal(np.float32(1) / global_scale_inv, after[name][2])
    result = proven(tmp_path / "b", tmp_path / "a", sum(result.lossless for result in results))
    assert 0 < result.relmse < 1e-14


def parts(folder: Path) -> dict[str, tuple[Any, Any, Any]]:
    """Codes, scales and the stored number of the global scale."""
    checkpoint, found = Checkpoint.open(folder), {}
    with Reader(checkpoint.inventory) as reader:
        for weight in (w for w in checkpoint.weights if w.name in checkpoint.formats):
            t = checkpoint.read_quantized(reader, weight)
            found[weight.name] = t.codes, t.scales, t.global_scale if t.global_scale_inv is None else t.global_scale_inv
    return found


def test_a_tensor_scale_that_is_a_power_of_two_keeps_every_value(moe: Path, tmp_path: Path) -> None:
    exact = linear("nvfp4", global_scale="power_of_two")
    run(moe, tmp_path / "a", exact, "compressed-tensors")
    for k, (old, dialect) in enumerate((("a", "modelopt"), ("0", "halfbyte"), ("1", "compressed-tensors"))):
        _, results = carried(tmp_path / old, tmp_path / str(k), exact, dialect)
        proven(tmp_path / str(k), tmp_path / old, len(results))
    assert tensors_of(tmp_path / "2") == tensors_of(tmp_path / "a")


def test_int4_of_kimi_becomes_ours_without_a_change(tmp_path: Path) -> None:
    source = kimi(tmp_path / "kimi")
    plan, results = carried(source, tmp_path / "out", recipe(EXPERTS_INT4))
    experts = [item for item in plan.items if item.weight.role.startswith("experts.")]
    assert {(item.action, item.reason) for item in experts} == {("transcode", LOSSLESS)}
    assert all(result.lossless for result in results)
    proven(tmp_path / "out", source, 2)


def test_int4_of_kimi_in_its_own_dialect_is_copied_with_its_types(tmp_path: Path) -> None:
    source = kimi(tmp_path / "kimi")
    carried(source, tmp_path / "out", recipe(EXPERTS_INT4), "compressed-tensors")
    assert tensors_of(tmp_path / "out") == tensors_of(source)
    assert "I32" in {info.dtype for name, info in Inventory.open(source).tensors.items() if "shape" in name}


def test_mxfp4_of_gpt_oss_becomes_nvfp4_where_the_exponents_fit(tmp_path: Path) -> None:
    source = gpt_oss(tmp_path / "source")
    _, results = carried(source, tmp_path / "out", recipe({"match": "experts", "format": "nvfp4"}))
    assert [result.lossless for result in results] == [True] * 4
    proven(tmp_path / "out", source, 4)


def test_an_expert_whose_exponents_do_not_fit_is_requantized_alone(tmp_path: Path) -> None:
    source = gpt_oss(tmp_path / "source", spread={2: 40})
    rule = {"match": "experts", "format": "nvfp4", "scale_search": "absmax"}
    _, results = carried(source, tmp_path / "out", recipe(rule))
    told = {result.name.rpartition(".")[2]: result for result in results}
    assert told["down_proj"].lossless and not told["gate_up_proj"].lossless
    assert told["gate_up_proj"].requantized == told["gate_up_proj"].elements // 4
    proven(tmp_path / "out", source, 2)
    before, after = (values(folder) for folder in (source, tmp_path / "out"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    same = [np.array_equal(before[name][expert], after[name][expert]) for expert in range(4)]
    assert same == [True, True, False, True]


@pytest.mark.parametrize("halvings", [10, 30])
def test_matrices_that_share_a_tensor_scale_fit_together_or_are_refused(
    dense: Path, tmp_path: Path, halvings: int
) -> None:
    tensors, name = dense_tensors(), "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = (tensors[name].astype(np.float32) * 2.0**-halvings).astype(ml_dtypes.bfloat16)
    plain = write_checkpoint(tmp_path / "plain", tensors, DENSE_CONFIG)
    run(plain, tmp_path / "a", linear("mxfp4"), "compressed-tensors")
    if halvings == 30:  # of its neighbours, which no global scale holds together with them
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)} has a relative error of 1 in nvfp4"):
            carried(tmp_path / "a", tmp_path / "b", linear("nvfp4"), "compressed-tensors")
        assert not (tmp_path / "b" / "config.json").exists() and not list((tmp_path / "b").glob("*.partial"))
        return
    _, results = carried(tmp_path / "a", tmp_path / "b", linear("nvfp4"), "compressed-tensors")
    attention = {result.name: result.lossless for result in results}
    assert all(attention[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkvo")
    assert verify(tmp_path / "b", tmp_path / "a").lossless == sum(attention.values())


@pytest.mark.parametrize("scale", [0.0, 1e-40])
def test_a_global_scale_without_a_finite_reciprocal_is_refused(dense: Path, tmp_path: Path, scale: float) -> None:
    run(dense, tmp_path / "a", linear("nvfp4"), "modelopt")
    stored, name = read_file(tmp_path / "a"), "model.layers.0.mlp.down_proj"
    stored[f"{name}.weight_scale_2"] = np.full_like(stored[f"{name}.weight_scale_2"], scale)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    other = write_checkpoint(tmp_path / "b", stored, config)
    with pytest.raises(CheckpointError, match=rf"{name}\.weight: its global scale is zero or so small"):
        carried(other, tmp_path / "c", linear("nvfp4"), "compressed-tensors")


def test_fused_matrices_with_a_tensor_scale_each_are_requantized_to_share_one(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "a", linear("nvfp4"), "compressed-tensors")
    stored = read_file(tmp_path / "a")
    stored["model.layers.0.self_attn.k_proj.weight_global_scale"] *= np.float32(1.5)
    other = write_checkpoint(tmp_path / "b", stored, json.loads((tmp_path / "a" / "config.json").read_text()))
    plan, results = carried(other, tmp_path / "c", linear("nvfp4"), "compressed-tensors")
    reasons = {item.weight.name: item.reason for item in plan.items}
    said = "lossless where projections that engines fuse share a scale, else requantized"
    assert reasons["model.layers.0.self_attn.q_proj.weight"] == said
    assert reasons["model.layers.0.self_attn.o_proj.weight"] == LOSSLESS
    changed = {result.name for result in results if result.requantized}
    assert changed == {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"}
    proven(tmp_path / "c", other, sum(result.lossless for result in results))


def test_experts_whose_gate_and_up_have_a_tensor_scale_each_are_requantized(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "a", linear("nvfp4"), "compressed-tensors")
    stored = read_file(tmp_path / "a")
    stored["model.language_model.layers.0.mlp.experts.2.up_proj.weight_global_scale"] *= np.float32(1.5)
    other = write_checkpoint(tmp_path / "b", stored, json.loads((tmp_path / "a" / "config.json").read_text()))
    _, results = carried(other, tmp_path / "c", linear("nvfp4"), "compressed-tensors")
    changed = {result.name: result for result in results if result.requantized}
    assert list(changed) == ["model.language_model.layers.0.mlp.experts.gate_up_proj"]
    assert next(iter(changed.values())).requantized == 256 * 128
    proven(tmp_path / "c", other, sum(result.lossless for result in results))


def test_a_group_that_is_quantized_only_in_part_is_requantized_together(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "a", recipe({"match": "attention", "format": "nvfp4"}), "halfbyte")
    stored, plain = read_file(tmp_path / "a"), read_file(dense)
    k = "model.layers.0.self_attn.k_proj.weight"
    for part in ("codes", "scales", "tensor_scale"):
        del stored[f"{k}_{part}"]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    other = write_checkpoint(tmp_path / "b", {**stored, k: plain[k]}, config)
    plan, results = carried(other, tmp_path / "c", recipe({"match": "attention", "format": "nvfp4"}))
    reasons = {item.weight.name: item.reason for item in plan.items}
    q = "model.layers.0.self_attn.q_proj.weight"
    assert reasons[q] == "requantized, since it shares a global scale with weights that are not quantized"
    changed = {result.name for result in results if result.requantized}
    assert changed == {q, q.replace("q_proj", "v_proj")}
    proven(tmp_path / "c", other, sum(result.lossless for result in results))


@pytest.mark.parametrize("target", ["halfbyte", "modelopt"])
def test_a_kept_weight_keeps_its_codes_in_another_dialect(moe: Path, tmp_path: Path, target: str) -> None:
    run(moe, tmp_path / "a", linear("fp8_block128"), "compressed-tensors")
    plan, results = carried(tmp_path / "a", tmp_path / "b", KEEP_ALL, target)
    assert {item.format.name for item in plan.items if item.format} == {"fp8_block128"}
    proven(tmp_path / "b", tmp_path / "a", len(results))


def test_scales_that_are_nan_are_found_without_decoding(tmp_path: Path) -> None:
    stored = read_file(gpt_oss(tmp_path / "source"))
    stored["model.layers.0.mlp.experts.down_proj_scales"][1, 2, 0] = 255
    config = {**GPT_OSS, "quantization_config": settings_of(tmp_path / "source")}
    source = write_checkpoint(tmp_path / "bad", stored, config)
    for fmt in ("mxfp4", "nvfp4"):
        with pytest.raises(CheckpointError, match=r"0\.mlp\.experts\.down_proj decodes to a NaN or an infinity"):
            carried(source, tmp_path / fmt, recipe({"match": "experts", "format": fmt}))


def test_verify_finds_a_changed_code_where_a_lossless_copy_was_promised(moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "a", linear("mxfp4"), "compressed-tensors")
    _, results = carried(tmp_path / "a", tmp_path / "b", linear("mxfp4"))
    without_checksums(tmp_path / "b")
    stored = read_file(tmp_path / "b")
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    stored[f"{name}_codes"][2, 5, 7] ^= 1
    write_checkpoint(tmp_path / "b", stored, json.loads((tmp_path / "b" / "config.json").read_text()))
    result = verify(tmp_path / "b", tmp_path / "a")
    assert result.problems == [f"{name} has the format of the source, mxfp4, but other values"]
    assert result.lossless == len(results) - 1
