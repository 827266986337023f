from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.checkpoint import Inventory
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from small_models import MOE_CONFIG, linear, moe_tensors, recipe, run, write_checkpoint

RECIPE = recipe(
    {"match": "experts", "format": "nvfp4", "scale_search": "absmax", "reason": "where the bytes are"},
    {"match": "vision.linear", "format": "mxfp4", "scale_search": "absmax", "if_not_divisible": "keep"},
    {"match": "mtp", "drop": True, "reason": "text only"},
)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG)


def test_the_parts_of_the_repository_add_up_to_the_bytes_on_disk(moe: Path, tmp_path: Path) -> None:
    plan = run(moe, tmp_path / "out", linear("nvfp4"), "compressed-tensors", max_shard_bytes=200_000)
    found = plan.summary()
    files = {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}
    weights = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    assert weights == found["data_bytes"] + found["header_bytes"]
    assert files["model.safetensors.index.json"] == found["index_bytes"]
    assert sum(files.values()) == found["repository_bytes"]
    side = sum(files[name] for name in plan.side_files)
    assert side == found["side_file_bytes"] > 0


def test_classes_cover_every_source_and_every_output_tensor(moe: Path) -> None:
    plan = make_plan(Checkpoint.open(moe), RECIPE, "compressed-tensors")
    found = plan.summary()
    assert sum(c["tensors"] for c in found["classes"]) == len(moe_tensors())
    assert sum(c["output_tensors"] for c in found["classes"]) == found["tensors"] == plan.tensors
    assert sum(c["bytes"] for c in found["classes"]) == found["data_bytes"]
    kept = [c for c in found["classes"] if c["action"] != "drop"]
    assert sum(c["parameters"] for c in kept) == found["parameters"]
    assert found["bits_per_weight"] == 8 * found["data_bytes"] / found["parameters"]


def test_a_class_says_format_bits_and_why(moe: Path) -> None:
    found = make_plan(Checkpoint.open(moe), RECIPE, "compressed-tensors").summary()["classes"]
    experts = next(c for c in found if c["role"] == "experts.gate_up")
    assert experts == {
        "role": "experts.gate_up",
        "action": "quantize",
        "format": "nvfp4",
        "tensors": 2,
        "output_tensors": 2 * 4 * 2 * 3,
        "parameters": 2 * 4 * 256 * 128,
        "bits_per_weight": 4.5 + 8 * 4 / (128 * 128),
        "bytes": 2 * 4 * 256 * 128 * 9 // 16 + 2 * 4 * 2 * 4,
        "reason": "where the bytes are",
    }


def test_kept_split_and_dropped_are_listed_with_reasons(moe: Path) -> None:
    found = make_plan(Checkpoint.open(moe), RECIPE, "compressed-tensors").summary()
    kept = {entry["role"]: entry for entry in found["kept"]}
    assert kept["router"]["reason"] == "no rule of the recipe selects it"
    assert "K = 48 is not a multiple of the block size 32 of mxfp4" in kept["vision.linear"]["reason"]
    assert {entry["reason"] for entry in found["dropped"]} == {"text only"}
    assert sum(entry["tensors"] for entry in found["dropped"]) == sum(n.startswith("mtp.") for n in moe_tensors())
    split = {entry["role"]: entry for entry in found["split"]}
    assert split["experts.down"]["tensors"] == 2 and split["experts.down"]["output_tensors"] == 2 * 4 * 3
    assert split["experts.down"]["example"] == "model.language_model.layers.0.mlp.experts.down_proj"


def test_nothing_is_split_where_experts_stay_fused_or_came_one_by_one(moe: Path, tmp_path: Path) -> None:
    assert make_plan(Checkpoint.open(moe), RECIPE, "halfbyte").summary()["split"] == []
    other = write_checkpoint(tmp_path / "moe", moe_tensors(per_expert=True), MOE_CONFIG)
    assert make_plan(Checkpoint.open(other), RECIPE, "compressed-tensors").summary()["split"] == []


@pytest.mark.parametrize(
    ("dropped", "contains"),
    [
        ([], {"text": True, "vision": True, "mtp": True}),
        (["mtp"], {"text": True, "vision": True, "mtp": False}),
        (["mtp", "vision"], {"text": True, "vision": False, "mtp": False}),
    ],
)
def test_it_says_which_parts_of_the_model_the_output_holds(
    moe: Path, dropped: list[str], contains: dict[str, bool]
) -> None:
    rules = [{"match": "experts", "format": "nvfp4"}]
    rules += [{"match": name, "drop": True, "reason": "not wanted"} for name in dropped]
    assert make_plan(Checkpoint.open(moe), recipe(*rules)).summary()["contains"] == contains


def test_the_whole_plan_names_every_tensor_with_its_fate_and_place(moe: Path, tmp_path: Path) -> None:
    plan = run(moe, tmp_path / "out", RECIPE, "compressed-tensors", max_shard_bytes=100_000)
    whole = json.loads(json.dumps(plan.to_dict()))
    assert {s["name"] for s in whole["sources"]} == set(moe_tensors())
    assert {s["action"] for s in whole["sources"]} == {"quantize", "keep", "split", "drop"}
    written = Inventory.open(tmp_path / "out").tensors
    assert {o["name"] for o in whole["outputs"]} == set(written)
    for output in whole["outputs"]:
        info = written[output["name"]]
        assert (info.dtype, list(info.shape), info.file, info.offset) == (
            output["dtype"],
            output["shape"],
            output["shard"],
            output["offset"],
        )
