from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.dialects import OutputTensor
from halfbyte.formats import get_format
from halfbyte.models import Weight
from halfbyte.plan import resources as slices
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.resources import MEMORY, Limits, cuts, find_resources, item_bytes, need, whole_rows
from halfbyte.plan.shards import Item
from halfbyte.recipes import Method
from halfbyte.source.checkpoint import Checkpoint
from small_models import DENSE_CONFIG, MOE_CONFIG, dense_tensors, linear, moe_tensors, write_checkpoint


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


def test_the_stated_memory_holds_the_two_largest_units_that_wait_for_their_amax(tmp_path: Path) -> None:
    config = {**DENSE_CONFIG, "num_hidden_layers": 3}
    tensors = {name: a for name, a in dense_tensors(inter=768).items() if "layers.0" in name}
    tensors |= {name.replace("layers.0", f"layers.{i}"): a for name, a in tensors.items() for i in (1, 2)}
    plan = make_plan(Checkpoint.open(write_checkpoint(tmp_path / "source", tensors, config)), linear("nvfp4"))
    gate_and_up = [u for s in plan.shards for u in s.units if u[0].weight.role.startswith("mlp.g")]
    assert [len(unit) for unit in gate_and_up] == [2, 2, 2]
    # two threads with 4 MiB have slices of 256 KiB, and units up to 512 KiB stay in memory
    stated = [find_resources(gate_and_up[:n], (), 0, Limits(2, 4 << 20)).memory for n in (1, 2, 3)]
    size = 2 * 768 * 128 * 2
    assert (stated[1] - stated[0], stated[2] - stated[1]) == (size, 0)


def test_the_stated_memory_holds_a_hessian_and_its_factors_for_each_thread(plan: Plan) -> None:
    unit = next(u for s in plan.shards for u in s.units if u[0].format and u[0].weight.role == "attention.o")
    columns = unit[0].weight.shape[-1]
    rounded = [replace(item, method=Method("gptq")) for item in unit]
    for threads in (1, 3):
        nearest, gptq = (find_resources([u], (), 0, Limits(threads)) for u in (unit, rounded))
        assert nearest.threads == gptq.threads == threads
        # the Hessian in FP32, and in FP64 the Hessian, its factor and the inverse of that
        assert gptq.memory - nearest.memory >= threads * (4 + 3 * 8) * columns**2


@pytest.mark.parametrize(
    ("dtype", "quantized", "folded", "wide"),
    [("BF16", False, False, 0), ("BF16", True, False, 8), ("BF16", False, True, 4), ("F64", False, False, 4)],
)
def test_a_slice_counts_as_read_as_converted_to_fp32_and_twice_as_packed(
    dtype: str, quantized: bool, folded: bool, wide: int
) -> None:
    """64 rows of 128 columns in MXFP4: 4.25 bits a weight."""
    fmt = get_format("mxfp4")
    outputs = (OutputTensor("w.codes", "U8", (256, 64), "codes"), OutputTensor("w.scales", "U8", (256, 4), "scales"))
    weight = Weight("w", "mlp.up", 0, (256, 128), dtype, ())
    item = Item(weight, "quantize", "why", fmt, "absmax", outputs=outputs)
    width = {"BF16": 2, "F64": 8}[dtype]
    assert need(item, 64, quantized, folded) == 64 * 128 * (width + wide) + 2 * 64 * (64 + 4)


def test_a_transposed_weight_counts_twice_and_a_rotated_one_in_fp32() -> None:
    weight = Weight("w", "mlp.up", 0, (4, 64, 128), "BF16", ())
    plain = Item(weight, "quantize", "why", get_format("mxfp4"), "absmax")
    turned = replace(plain, weight=replace(weight, transposed=True))
    rotated = replace(plain, format=get_format("mxfp4_hadamard"))
    sizes = [need(item, 2, False) for item in (plain, turned, rotated)]
    assert sizes == [2 * 64 * 128 * width for width in (2, 4, 6)]


def test_a_copied_weight_takes_a_slice_at_most() -> None:
    outputs = (OutputTensor("w", "BF16", (1 << 16, 128), "copy"),)
    item = Item(Weight("w", "norm", 0, (1 << 16, 128), "BF16", ()), "keep", "why", outputs=outputs)
    assert (need(item, 1 << 16, False), need(item, 1 << 16, False, True)) == (8 << 20, 4 * (8 << 20))
    small = replace(item, weight=replace(item.weight, shape=(2, 128)))
    assert need(small, 2, False) == 2 * 128 * 2


def test_there_are_no_more_threads_than_slices_fit_into_the_memory(plan: Plan) -> None:
    units = [u for s in plan.shards for u in s.units]
    one, many = (find_resources(units, (), 0, Limits(8, memory)) for memory in (1, 1 << 30))
    slice_of_one = one.memory - (80 << 20)
    assert (one.threads, many.threads) == (1, 8)
    three = find_resources(units, (), 0, Limits(8, 3 * slice_of_one + 1))
    assert three == (3, (80 << 20) + 3 * slice_of_one)


def test_a_matrix_whose_rows_take_each_others_errors_stays_whole_and_its_metric_is_counted(plan: Plan) -> None:
    matrix = next(i for i in plan.items if i.format and len(i.weight.shape) == 2)
    alone = replace(matrix, method=Method("gptq"))
    coupled = replace(matrix, method=Method("gptq", output="fisher"))
    rows, columns = matrix.weight.shape
    assert cuts(coupled, 1, 1) == [(0, rows)] and len(cuts(alone, 1, 1)) > 1
    assert need(coupled, rows, False) - need(alone, rows, False) >= 4 * rows**2 + 4 * rows * columns


def test_experts_whose_rows_take_each_others_errors_are_still_cut_one_by_one(plan: Plan) -> None:
    stack = next(i for i in plan.items if i.format and len(i.weight.shape) == 3)
    coupled = replace(stack, method=Method("gptq", output="fisher"))
    assert cuts(coupled, 1, 1) == [(i, i + 1) for i in stack.indices]
