from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.plan import resources as slices
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.resources import MEMORY, Limits, cuts, item_bytes, whole_rows
from halfbyte.source.checkpoint import Checkpoint
from small_models import MOE_CONFIG, linear, moe_tensors, write_checkpoint


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    source = write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG)
    return make_plan(Checkpoint.open(source), linear("fp8_block128"))


@pytest.mark.parametrize("limit", [1, 10_000, 1 << 20])
def test_cuts_cover_every_index_once_and_in_order(plan: Plan, limit: int) -> None:
    for item in (item for item in plan.items if item.format):
        found = cuts(item, whole_rows(item.format), limit)
        assert [i for first, stop in found for i in range(first, stop)] == list(item.indices)
        if len(item.weight.shape) == 2:
            assert all(first % 128 == 0 for first, _ in found)  # whole tiles


def test_slices_are_as_large_as_the_limit_allows(plan: Plan) -> None:
    item = max((i for i in plan.items if i.format and len(i.weight.shape) == 3), key=item_bytes)
    expert = item_bytes(item) // item.weight.shape[0]
    assert all(stop - first == 2 for first, stop in cuts(item, 1, 2 * expert))


def test_slices_shrink_where_many_threads_share_little_memory() -> None:
    assert Limits(2, MEMORY).slice_bytes == slices.SLICE_BYTES
    assert Limits(64, 1 << 30).slice_bytes == 1 << 21
    assert Limits(64, 1).slice_bytes == 1 << 18  # smaller ones would cost more than they save


def test_threads_are_as_many_as_cores_by_default() -> None:
    assert Limits().threads == slices.cores() >= 1


def test_the_statement_does_not_depend_on_which_files_the_weights_lie_in(tmp_path: Path, plan: Plan) -> None:
    checkpoint = plan.checkpoint
    parts = make_plan(checkpoint, linear("fp8_block128"), max_shard_bytes=50_000)
    assert len(parts.shards) > len(plan.shards)
    assert parts.resources(Limits(2)) == plan.resources(Limits(2))
