"""Slices, threads and files of one conversion at the same time: what overlaps, and that it changes no byte."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from halfbyte.checkpoint import ShardWriter
from halfbyte.convert import work_unit as units
from halfbyte.convert.conversion import convert
from halfbyte.plan import resources as slices
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.shards import Item
from halfbyte.source.checkpoint import Checkpoint
from small_models import MOE_CONFIG, hashes, linear, moe_tensors, run, write_checkpoint


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG, shards=3)


@pytest.mark.parametrize("fmt", ["nvfp4", "fp8_tensor"])
def test_memory_changes_no_byte(moe: Path, tmp_path: Path, fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # small slices, so that matrices with one amax are held in memory, or read twice where there is none
    monkeypatch.setattr(slices, "SLICE_BYTES", 1024)
    plan = make_plan(Checkpoint.open(moe), linear(fmt))
    errors = [convert(plan, tmp_path / str(memory), 3, memory=memory).errors for memory in (1, 1 << 30)]
    assert hashes(tmp_path / "1") == hashes(tmp_path / str(1 << 30))
    assert errors[0] == errors[1]


def test_slices_of_one_stack_are_encoded_side_by_side(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "SLICE_BYTES", 1024)
    encode_slice, together = units.encode_slice, threading.Barrier(2)
    met: list[str] = []

    def meeting(plan: Plan, item: Item, *more: Any) -> Any:
        if len(item.weight.shape) > 2 and not met:
            together.wait(30)
            met.append(item.weight.name)
        return encode_slice(plan, item, *more)

    monkeypatch.setattr(units, "encode_slice", meeting)
    convert(make_plan(Checkpoint.open(moe), linear("nvfp4")), tmp_path / "out", threads=2)
    assert len(set(met)) == 1


def test_the_next_file_is_written_while_one_is_made_durable(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, write_at = ShardWriter.commit, ShardWriter.write_at
    next_one = threading.Event()
    names: list[str] = []

    def waiting(writer: ShardWriter) -> None:
        names.append(writer.path.name)
        assert len(names) > 1 or next_one.wait(30)
        commit(writer)

    def writing(writer: ShardWriter, *more: Any) -> None:
        write_at(writer, *more)
        if "00002-of" in writer.path.name:
            next_one.set()

    monkeypatch.setattr(ShardWriter, "commit", waiting)
    monkeypatch.setattr(ShardWriter, "write_at", writing)
    plan = run(moe, tmp_path / "out", linear("nvfp4"), max_shard_bytes=100_000)
    assert sorted(names) == [shard.name for shard in plan.shards]


def test_a_failure_in_the_background_stops_the_conversion(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: ShardWriter) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "commit", full)
    with pytest.raises(OSError, match="No space left"):
        run(moe, tmp_path / "out", linear("nvfp4"), max_shard_bytes=100_000)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".halfbyte"]
