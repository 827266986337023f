"""Errors of other converters that cost a conversion or, unnoticed, a deployment: each test is named after one.

Whole conversions: what `verify` says of damaged outputs is in test_verify.py, how engines group and ignore modules in
dialects/, what transformers makes of the files in runtime/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.checkpoint import Inventory
from halfbyte.cli import main
from halfbyte.errors import CheckpointError, FormatError, PlanError
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.recipes import load_recipe
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from small_models import (
    DATA_FREE,
    DENSE_CONFIG,
    MOE_CONFIG,
    dense_tensors,
    heavy_tailed,
    linear,
    moe_tensors,
    read_file,
    recipe,
    run,
    spell_per_expert,
    write_checkpoint,
)

DIALECTS = ["halfbyte", "compressed-tensors", "modelopt"]
TEXT_ONLY = {"makora-mixfp4"}
# the card that these reproduce has the router in 8 bit
EIGHT_BIT_ROUTER = {"ud-mxfp4": "affine8_g64", "ud-q4": "affine8_g64"}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG)


@pytest.fixture(scope="module")
def qwen36(request: pytest.FixtureRequest) -> Checkpoint:
    shared: Path = request.getfixturevalue("shared")
    return Checkpoint(Inventory.from_json(shared / "inventories" / "qwen36_35b_a3b.json"))


def outputs(plan: Plan) -> dict[str, str]:
    return {o.name: o.dtype for item in plan.items for o in item.outputs}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("per_expert", [False, True], ids=["fused", "per expert"])
def test_experts_left_in_bf16_unnoticed(tmp_path: Path, dialect: str, per_expert: bool) -> None:
    source = write_checkpoint(tmp_path / "source", moe_tensors(per_expert), MOE_CONFIG)
    written = outputs(make_plan(Checkpoint.open(source), linear("nvfp4"), dialect))
    experts = {name: dtype for name, dtype in written.items() if "language_model" in name and ".experts." in name}
    assert experts and "BF16" not in experts.values()


@pytest.mark.parametrize("name", DATA_FREE)
def test_experts_left_in_bf16_unnoticed_by_a_built_in_recipe(name: str, qwen36: Checkpoint) -> None:
    items = [i for i in make_plan(qwen36, name, "halfbyte").items if i.weight.role.startswith("experts.")]
    assert len(items) == 80 and all(item.action == "quantize" for item in items)


@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt"])
def test_gate_and_up_with_different_tensor_scales(tmp_path: Path, dialect: str) -> None:
    tensors = moe_tensors()
    fused = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    gate = "model.language_model.layers.0.mlp.shared_expert.gate_proj.weight"
    # gate is a hundred times larger than up; both are rows of one tensor here, two tensors in the engine's spelling
    tensors[fused][:, : tensors[fused].shape[1] // 2] *= tensors[fused].dtype.type(100)
    tensors[gate] = tensors[gate] * tensors[gate].dtype.type(100)
    for spelling in (tensors, spell_per_expert(tensors)):
        source = write_checkpoint(tmp_path / f"source-{len(spelling)}", spelling, MOE_CONFIG)
        run(source, tmp_path / f"out-{len(spelling)}", linear("nvfp4"), dialect)
        stored = read_file(tmp_path / f"out-{len(spelling)}")
        gates = [n for n in stored if "gate_proj" in n and n.endswith(("weight_global_scale", "weight_scale_2"))]
        assert len(gates) == 2 * (4 + 1)
        assert all(stored[n].tobytes() == stored[n.replace("gate_proj", "up_proj")].tobytes() for n in gates)
        assert verify(tmp_path / f"out-{len(spelling)}", source).problems == []


@pytest.mark.slow
@pytest.mark.parametrize(("part", "prefix", "count"), [("mtp", "mtp.", 19), ("vision", "model.visual.", 333)])
@pytest.mark.parametrize("name", sorted(set(DATA_FREE) - TEXT_ONLY))
def test_mtp_or_vision_dropped_by_a_built_in_recipe(
    name: str, part: str, prefix: str, count: int, qwen36: Checkpoint
) -> None:
    written = outputs(make_plan(qwen36, name, "halfbyte"))
    kept = [dtype for tensor, dtype in written.items() if tensor.startswith(prefix)]
    assert kept == ["BF16"] * count


@pytest.mark.parametrize("dialect", DIALECTS)
def test_mtp_dropped(moe: Path, tmp_path: Path, dialect: str) -> None:
    assert_kept_to_the_byte("mtp.", moe, tmp_path, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_vision_dropped(moe: Path, tmp_path: Path, dialect: str) -> None:
    assert_kept_to_the_byte("model.visual.", moe, tmp_path, dialect)


def assert_kept_to_the_byte(prefix: str, moe: Path, tmp_path: Path, dialect: str) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"), dialect)
    source, out = moe_tensors(), read_file(tmp_path / "out")
    wanted = {name for name in source if name.startswith(prefix)}
    assert wanted and {name for name in out if name.startswith(prefix)} == wanted
    assert all(out[name].tobytes() == source[name].tobytes() for name in wanted)
    # and the loss of one of them would not go unnoticed
    lost = min(wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    write_checkpoint(tmp_path / "out", {n: a for n, a in out.items() if n != lost}, config)
    assert any(lost in problem for problem in verify(tmp_path / "out", moe).problems)


@pytest.mark.parametrize("name", DATA_FREE)
def test_router_quantized(name: str, qwen36: Checkpoint) -> None:
    items = make_plan(qwen36, name, "halfbyte").items
    gates = [i for i in items if i.weight.role in ("router", "shared_expert_gate")]
    assert len(gates) == 80
    assert {i.format.name if i.format else "kept" for i in gates} == {EIGHT_BIT_ROUTER.get(name, "kept")}


@pytest.mark.parametrize("name", sorted(set(DATA_FREE) - set(EIGHT_BIT_ROUTER)))
def test_norms_embeddings_and_small_projections_quantized(name: str, qwen36: Checkpoint) -> None:
    items = make_plan(qwen36, name, "halfbyte").items
    quantized = {i.weight.role for i in items if i.action == "quantize"}
    never = {"norm", "embedding", "linear_attention.conv", "linear_attention.state", "linear_attention.a"}
    assert not quantized & (never | {"linear_attention.b"})
    assert not [role for role in quantized if role.startswith(("mtp.", "vision."))]


@pytest.mark.parametrize(
    ("rule", "count"),
    [("experts", 80), (r"re:mlp\.experts", 80), (r"re:layers\.\d+\.mlp\.experts", 80), (r"re:layers\.3\..*experts", 2)],
)
def test_a_rule_that_matches_mtp_layers_by_accident(rule: str, count: int, qwen36: Checkpoint) -> None:
    plan = make_plan(qwen36, recipe({"match": rule, "format": "nvfp4"}))
    quantized = [item.weight.name for item in plan.items if item.format]
    assert len(quantized) >= count and not [name for name in quantized if name.startswith("mtp.")]


@pytest.mark.parametrize("rule", ["mtp.experts", r"re:mtp\..*experts", r"re:^mtp\.layers\.0\.mlp\.experts"])
def test_a_rule_for_mtp_layers_that_misses_them(rule: str, qwen36: Checkpoint) -> None:
    plan = make_plan(qwen36, recipe({"match": rule, "format": "nvfp4"}))
    quantized = [item.weight.name for item in plan.items if item.format]
    assert len(quantized) == 2 and all(name.startswith("mtp.") for name in quantized)


@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
def test_conv1d_taken_for_experts(qwen36: Checkpoint, dialect: str) -> None:
    plan = make_plan(qwen36, recipe({"match": "experts", "format": "nvfp4"}), dialect)
    assert not [item for item in plan.items if item.format and "conv1d" in item.weight.name]
    with pytest.raises(FormatError, match=r"conv1d\.weight: K = 4 is not a multiple of the block size 16 of nvfp4"):
        make_plan(qwen36, recipe({"match": "re:conv1d", "format": "nvfp4"}), dialect)
    if dialect != "halfbyte":
        with pytest.raises(PlanError, match=r"conv1d\.weight has the shape \[8192, 1, 4\]"):
            make_plan(qwen36, recipe({"match": "re:conv1d", "format": "fp8_channel"}), dialect)


def test_k_4304_in_a_format_of_block_32(qwen36: Checkpoint) -> None:
    rule = {"match": "vision.linear", "format": "mxfp4"}
    with pytest.raises(FormatError, match=r"linear_fc2\.weight: K = 4304 is not a multiple of the block size 32"):
        make_plan(qwen36, recipe(rule))
    plan = make_plan(qwen36, recipe({**rule, "if_not_divisible": "keep"}))
    kept = [i for i in plan.items if i.action == "keep" and "linear_fc2" in i.weight.name and "blocks" in i.weight.name]
    assert len(kept) == 27 + 27 and any("K = 4304" in item.reason for item in kept)  # weights and biases
    assert make_plan(qwen36, recipe({**rule, "format": "nvfp4"})).bits_per_weight < 16


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"match": "lm_head", "format": "nvfp4"}, "embed_tokens.weight: keep, lm_head.weight: nvfp4"),
        ({"match": "embedding", "format": "nvfp4"}, "embed_tokens.weight: nvfp4, lm_head.weight: keep"),
    ],
)
def test_tied_embeddings_quantized_on_one_side_only(tmp_path: Path, rule: dict[str, str], told: str) -> None:
    config = {**DENSE_CONFIG, "tie_word_embeddings": True}
    source = write_checkpoint(tmp_path / "source", dense_tensors(tied=True), config)
    with pytest.raises(PlanError, match=f"embeddings are tied .* but they have model.{told}"):
        make_plan(Checkpoint.open(source), recipe(rule))
    both = recipe({"match": ["lm_head", "embedding"], "format": "nvfp4", "scale_search": "absmax"})
    run(source, tmp_path / "out", both)
    stored = read_file(tmp_path / "out")
    assert stored["lm_head.weight_codes"].tobytes() == stored["model.embed_tokens.weight_codes"].tobytes()


def test_one_indivisible_member_leaves_its_fusion_group_in_two_formats(tmp_path: Path) -> None:
    tensors = dense_tensors()
    tensors["model.layers.0.self_attn.v_proj.weight"] = heavy_tailed(np.random.default_rng(0), 64, 136)
    source = write_checkpoint(tmp_path / "source", tensors, DENSE_CONFIG)
    with pytest.raises(PlanError, match=r"engines fuse the group model\.layers\.0\.self_attn\.qkv_proj"):
        make_plan(Checkpoint.open(source), linear("nvfp4", if_not_divisible="keep"))


@pytest.mark.parametrize("command", ["inspect", "plan", "quantize"])
def test_a_missing_shard_reported_as_success(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "source", moe_tensors(), MOE_CONFIG, shards=3)
    out = tmp_path / "out"
    arguments = {"inspect": [], "plan": ["--recipe", "nvfp4"], "quantize": [str(out), "--recipe", "nvfp4"]}[command]
    lost = sorted(source.glob("*.safetensors"))[1]
    lost.unlink()
    assert main([command, str(source), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and f"shard {lost.name} is named by the index but is missing" in printed.err
    assert not out.exists()


@pytest.mark.parametrize("source_too", [False, True])
def test_a_missing_shard_of_an_output_reported_as_success(
    source_too: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "source", moe_tensors(), MOE_CONFIG, shards=3)
    run(source, tmp_path / "out", linear("nvfp4"), max_shard_bytes=200_000)
    lost = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    lost.unlink()
    assert main(["verify", str(tmp_path / "out"), *(["--against", str(source)] if source_too else [])]) == 1
    assert f"{lost.name} is missing" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
@pytest.mark.parametrize("same", [True, False], ids=["same dialect", "other dialect"])
def test_zero_input_scales(tmp_path: Path, bad: float, same: bool) -> None:
    """An expert that saw no token of the calibration has the input scale 0, by which engines divide."""
    tensors: dict[str, Any] = {}
    run(
        write_checkpoint(tmp_path / "dense", dense_tensors(), DENSE_CONFIG), tmp_path / "a", linear("nvfp4"), "modelopt"
    )
    for name, array in read_file(tmp_path / "a").items():
        tensors[name] = array
        if name.endswith(".weight_scale_2"):
            tensors[name.replace("weight_scale_2", "input_scale")] = np.array(0.01, np.float32)
    damaged = next(name for name in tensors if name.endswith("up_proj.input_scale"))
    tensors[damaged] = np.array(bad, np.float32)
    source = write_checkpoint(tmp_path / "b", tensors, json.loads((tmp_path / "a" / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=damaged.replace(".", r"\.")):
        run(source, tmp_path / "c", linear("nvfp4"), "modelopt" if same else "compressed-tensors")
    assert not (tmp_path / "c" / "config.json").exists()


def test_a_recipe_that_selects_nothing_reported_as_success(moe: Path) -> None:
    assert load_recipe("mixfp4").rules  # and none of them is optional
    with pytest.raises(PlanError, match="nothing"):
        make_plan(Checkpoint.open(moe), recipe({"match": "mlp.gate", "format": "nvfp4", "optional": True}))
