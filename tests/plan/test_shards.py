from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from halfbyte.checkpoint import Inventory
from halfbyte.plan.build import make_plan
from halfbyte.plan.shards import make_index
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from small_models import MOE_CONFIG, linear, moe_tensors, run, write_checkpoint


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG)


@pytest.mark.parametrize("limit", [30_000, 60_000, 300_000, 10_000_000])
@pytest.mark.parametrize("dialect", ["halfbyte", "compressed-tensors"])
def test_files_stay_below_the_limit_with_their_headers(moe: Path, limit: int, dialect: str) -> None:
    plan = make_plan(Checkpoint.open(moe), linear("nvfp4"), dialect, limit)
    large = [shard for shard in plan.shards if shard.layout.total > limit]
    assert all(len(shard.units) == 1 for shard in large)  # a group or a tensor that cannot be divided
    assert not [i for shard in large for i in shard.items if i.outputs[0].expert is not None and len(i.indices) > 1]
    assert not large or limit < 300_000
    assert len(plan.shards) > 1 or limit > 1_000_000


@pytest.mark.slow
def test_the_limit_of_five_gigabytes_holds_for_a_stack_that_is_larger(shared: Path) -> None:
    checkpoint = Checkpoint(Inventory.from_json(shared / "inventories" / "kimi_k2_thinking.patterns.json"))
    plan = make_plan(checkpoint, "nvfp4", "compressed-tensors")
    assert max(item.nbytes for item in plan.items) > 5_000_000_000  # gate and up of 384 experts
    assert max(shard.layout.total for shard in plan.shards) <= 5_000_000_000


def test_a_stack_over_several_files_is_converted_as_one(moe: Path, tmp_path: Path) -> None:
    whole = run(moe, tmp_path / "whole", linear("nvfp4"), "compressed-tensors")
    split = run(moe, tmp_path / "split", linear("nvfp4"), "compressed-tensors", max_shard_bytes=30_000)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    files = {s.name for s in split.shards for i in s.items if i.weight.name == name}
    assert len(files) > 1 and split.tensors == whole.tensors and split.data_bytes == whole.data_bytes
    results = [verify(tmp_path / out, moe) for out in ("whole", "split")]
    assert all(result.ok for result in results)
    assert [e.relmse for e in results[0].errors] == [e.relmse for e in results[1].errors]


def test_errors_of_a_stack_over_several_files_are_added_up(moe: Path, tmp_path: Path) -> None:
    from halfbyte.convert.conversion import convert

    plans = [
        make_plan(Checkpoint.open(moe), linear("mixfp4"), "compressed-tensors", limit) for limit in (10**9, 30_000)
    ]
    whole, split = [{e.name: e for e in convert(plan, tmp_path / f"out{k}").errors} for k, plan in enumerate(plans)]
    assert list(whole) == list(split)
    for name, error in whole.items():
        other = split[name]
        assert (error.elements, error.max_error, error.codebook_blocks) == (
            other.elements,
            other.max_error,
            other.codebook_blocks,
        )
        assert np.isclose(error.squared_error, other.squared_error, rtol=1e-12)


def test_fusion_groups_are_never_divided_between_files(moe: Path) -> None:
    plan = make_plan(Checkpoint.open(moe), linear("nvfp4"), "compressed-tensors", 1000)
    places: dict[str, set[str]] = {}
    for shard in plan.shards:
        for item in shard.items:
            if item.weight.group:
                places.setdefault(item.weight.group, set()).add(shard.name)
    assert places and all(len(files) == 1 for files in places.values())


def test_a_tensor_above_the_limit_is_said_in_a_note(moe: Path) -> None:
    plan = make_plan(Checkpoint.open(moe), linear("nvfp4"), "halfbyte", 20_000)
    assert any("larger than 20000 bytes" in note for note in plan.notes)


def test_the_index_maps_every_tensor_to_its_file_and_states_the_bytes(moe: Path) -> None:
    plan = make_plan(Checkpoint.open(moe), linear("nvfp4"), "compressed-tensors", 100_000)
    index = json.loads(make_index(plan.shards) or b"")
    assert index["weight_map"] == {o.name: s.name for s in plan.shards for i in s.items for o in i.outputs}
    assert index["metadata"]["total_size"] == plan.data_bytes
    assert list(index["weight_map"]) == sorted(index["weight_map"])


def test_one_file_has_the_plain_name_and_no_index(moe: Path) -> None:
    plan = make_plan(Checkpoint.open(moe), linear("nvfp4"))
    assert [s.name for s in plan.shards] == ["model.safetensors"] and plan.index is None
