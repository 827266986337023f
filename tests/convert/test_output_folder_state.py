"""What a folder holds before a conversion: nothing, a beginning, or all of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from halfbyte.checkpoint.identity import SourceIdentity
from halfbyte.convert.conversion import convert
from halfbyte.convert.output_folder_state import already_complete, continue_or_begin, source_identity
from halfbyte.errors import CheckpointError, OutputError
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.source.checkpoint import Checkpoint
from small_models import DENSE_CONFIG, dense_tensors, hashes, linear, write_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", dense_tensors(), DENSE_CONFIG)


@pytest.fixture
def plan(source: Path) -> Plan:
    return make_plan(Checkpoint.open(source), linear("nvfp4"), max_shard_bytes=50_000)


@pytest.fixture
def complete(plan: Plan, tmp_path: Path) -> Path:
    return convert(plan, tmp_path / "out").out


def is_complete(plan: Plan, out: Path, source: Path) -> bool:
    return already_complete(plan, out, source_identity(plan))


def begin(plan: Plan, out: Path, source: Path) -> tuple[set[str], list[str]]:
    """Files that are finished, and what was announced."""
    told: list[str] = []
    journal = continue_or_begin(plan, out, source_identity(plan), told.append)
    return set(journal.done), told


def test_a_new_and_an_empty_folder_are_not_complete(plan: Plan, source: Path, tmp_path: Path) -> None:
    assert not is_complete(plan, tmp_path / "new", source)
    (tmp_path / "empty").mkdir()
    assert not is_complete(plan, tmp_path / "empty", source)


def test_the_output_of_the_plan_is_complete_and_left_alone(plan: Plan, source: Path, complete: Path) -> None:
    before = hashes(complete)
    (complete / "notes.txt").write_text("of the user")
    assert is_complete(plan, complete, source)
    done = convert(plan, complete)
    assert done.already_complete and done.errors == [] and done.resumed_shards == len(plan.shards)
    assert before.items() < hashes(complete).items()


def test_the_output_of_another_plan_is_a_folder_that_is_not_empty(plan: Plan, source: Path, complete: Path) -> None:
    other = make_plan(Checkpoint.open(source), linear("mxfp4"))
    with pytest.raises(OutputError, match="is not empty; choose another folder or empty it"):
        is_complete(other, complete, source)


@pytest.mark.parametrize("damage", ["missing", "cut"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "shard"])
def test_a_complete_output_with_a_damaged_file_is_refused(
    plan: Plan, source: Path, complete: Path, name: str, damage: str
) -> None:
    file = complete / (plan.shards[1].name if name == "shard" else name)
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(OutputError, match=f"was complete, but {file.name} is damaged or missing now; remove"):
        is_complete(plan, complete, source)


def test_a_side_file_may_be_changed_by_the_user(plan: Plan, source: Path, complete: Path) -> None:
    (complete / "tokenizer.json").write_text("another")
    assert is_complete(plan, complete, source)


def test_the_output_from_another_state_of_the_source_is_refused(plan: Plan, source: Path, complete: Path) -> None:
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (source / "model.safetensors").write_bytes(data)
    again = make_plan(Checkpoint.open(source), linear("nvfp4"), max_shard_bytes=50_000)
    assert again.fingerprint == plan.fingerprint
    with pytest.raises(OutputError, match="holds the output of this plan from another state of the source"):
        is_complete(again, complete, source)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"source": 3}', b"\xff"])
def test_a_halfbyte_json_that_cannot_be_read_is_no_output_of_ours(
    plan: Plan, source: Path, complete: Path, content: bytes
) -> None:
    (complete / "halfbyte.json").write_bytes(content)
    with pytest.raises(OutputError, match="is not empty"):
        is_complete(plan, complete, source)


def test_a_source_that_changed_after_the_plan_is_refused(plan: Plan, source: Path) -> None:
    assert isinstance(source_identity(plan), SourceIdentity)
    os.truncate(source / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed after the plan was made"):
        source_identity(plan)


def test_a_beginning_is_continued_with_what_is_whole(plan: Plan, source: Path, tmp_path: Path) -> None:
    assert begin(plan, tmp_path / "out", source) == (set(), [])
    names = [shard.name for shard in plan.shards]
    whole = convert(plan, tmp_path / "whole").out
    told: list[str] = []
    journal = continue_or_begin(plan, tmp_path / "out", source_identity(plan), told.append)
    for name, entry in json.loads((whole / "halfbyte.json").read_text())["files"].items():
        if name in names[:2]:
            (tmp_path / "out" / name).write_bytes((whole / name).read_bytes())
            journal.record(name, entry["bytes"], {"sha256": entry["sha256"], "errors": []})
    (tmp_path / "out" / f"{names[2]}.partial").write_bytes(b"cut")
    assert begin(plan, tmp_path / "out", source) == (
        set(names[:2]),
        [f"continuing in {tmp_path / 'out'}: 2 of {len(names)} weight files are finished"],
    )
    assert not list((tmp_path / "out").glob("*.partial"))
    data = bytearray((tmp_path / "out" / names[0]).read_bytes())
    data[-1] ^= 1
    (tmp_path / "out" / names[0]).write_bytes(data)
    assert begin(plan, tmp_path / "out", source)[0] == {names[1]}


def test_a_beginning_from_another_state_of_the_source_is_refused(plan: Plan, source: Path, tmp_path: Path) -> None:
    begin(plan, tmp_path / "out", source)
    tensors = dense_tensors()
    tensors["model.norm.weight"] = np.negative(tensors["model.norm.weight"])
    write_checkpoint(source, tensors, DENSE_CONFIG)
    again = make_plan(Checkpoint.open(source), linear("nvfp4"), max_shard_bytes=50_000)
    with pytest.raises(OutputError, match="of the source is not what it was when the conversion in"):
        begin(again, tmp_path / "out", source)
