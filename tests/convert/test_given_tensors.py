"""Tensors that a conversion is given: written as they are, and read instead of what lies in the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from halfbyte.checkpoint import Reader
from halfbyte.convert.conversion import convert
from halfbyte.convert.given_tensors import GivenTensors
from halfbyte.errors import PlanError
from halfbyte.plan.build import make_plan
from halfbyte.search import encode
from halfbyte.source.checkpoint import Checkpoint
from small_models import DENSE_CONFIG, dense_tensors, linear, write_checkpoint


def checkpoint(folder: Path) -> Checkpoint:
    write_checkpoint(folder, dense_tensors(), DENSE_CONFIG)
    return Checkpoint.open(folder)


def test_a_kept_tensor_is_read_from_memory_in_rows_and_chunks(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m")
    name = "model.embed_tokens.weight"
    with Reader(source.inventory) as plain:
        other = plain.read(name)[::-1].copy()
    with GivenTensors(dense={name: other}).reader(source.inventory) as reader:
        np.testing.assert_array_equal(reader.read(name, 3, 5), other[3:5])
        assert bytes(reader.chunk(name, 10, 20)) == other.tobytes()[10:30]
        assert reader.read("model.norm.weight").size


def test_given_codes_are_written_and_the_error_is_that_against_the_source(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m")
    plan = make_plan(source, linear("mxfp4"))
    item = next(i for i in plan.items if i.weight.name.endswith("down_proj.weight"))
    tensor = encode(np.full(item.weight.shape, 0.5, np.float32), "mxfp4", "absmax")
    given = GivenTensors({item.weight.name: lambda a, b: encode(tensor.decode()[a:b], "mxfp4", "absmax")})
    done = convert(plan, tmp_path / "out", 1, given=given)
    assert next(e for e in done.errors if e.name == item.weight.name).relmse > 1
    out = Checkpoint.open(tmp_path / "out")
    with Reader(out.inventory) as reader:
        weight = next(w for w in out.weights if w.name == item.weight.name)
        assert (out.read(reader, weight) == 0.5).all()


def test_part_of_a_fusion_group_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m")
    plan = make_plan(source, linear("nvfp4"))
    item = next(i for i in plan.items if i.weight.group)
    given = GivenTensors({item.weight.name: lambda a, b: encode(np.ones((b - a, 128)), "nvfp4", "absmax")})
    with pytest.raises(PlanError, match="shares a scale"):
        convert(plan, tmp_path / "out", 1, given=given)
