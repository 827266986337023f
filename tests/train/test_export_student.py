"""Exports: what the forward pass saw is what the files hold, in every format and dialect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import halfbyte
from halfbyte.checkpoint import Reader
from halfbyte.dialects import get_dialect
from halfbyte.errors import HalfbyteError, OutputError, PlanError
from halfbyte.formats import QuantizedTensor, get_format
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.train.export_student import write
from halfbyte.train.rounding import in_block_space, round_searched
from halfbyte.train.start import Origin, origin_of
from halfbyte.train.student import student_of
from halfbyte.verify.weights import verify
from matrix.cases import HELD, planned


def trained(origin: Origin) -> dict[str, QuantizedTensor]:
    """Codes and scales as training leaves them: other codes than any search finds, with the scales of the start."""
    rng = np.random.default_rng(3)
    tensors = {}
    with Reader(origin.checkpoint.inventory) as reader:
        for name, item in origin.items.items():
            assert item.format is not None
            values = np.array(origin.checkpoint.read(reader, item.weight), dtype=np.float32)
            swapped = values.ndim == 3 and values.shape != item.weight.shape
            values = np.ascontiguousarray(np.swapaxes(values, 1, 2)) if swapped else values
            start = round_searched(origin.export_plan, item, np.asarray(item.format.rotate(values)[0]), [values]).tensor
            moved = in_block_space(start, values) + rng.normal(0, 0.3 * values.std(), values.shape).astype(np.float32)
            tensors[name] = item.format.round_to(start, moved)
    return tensors


def check_held(out: Path, tensors: dict[str, QuantizedTensor], same_scale: bool) -> None:
    """Every code and every scale of the output is the one that was given."""
    checkpoint = Checkpoint.open(out)
    weights = {weight.name: weight for weight in checkpoint.weights}
    assert checkpoint.formats.keys() == tensors.keys()
    with Reader(checkpoint.inventory) as reader:
        for name, tensor in tensors.items():
            held = checkpoint.read_quantized(reader, weights[name])
            np.testing.assert_array_equal(held.codes, tensor.codes, name)
            np.testing.assert_array_equal(held.scales.astype(np.float32), tensor.scales.astype(np.float32), name)
            if tensor.offsets is not None:
                np.testing.assert_array_equal(held.offsets, tensor.offsets, name)
            if same_scale:
                np.testing.assert_array_equal(held.decode(), tensor.decode(), name)


@pytest.mark.parametrize(("dialect", "fmt"), [(d.name, f.name) for d, f in HELD])
def test_every_format_is_written_as_it_was_trained(dialect: str, fmt: str, tmp_path: Path) -> None:
    model = {"gpt-oss": "gpt-oss"}.get(dialect, "dense")
    source, plan = planned(tmp_path, dialect, get_format(fmt), model)
    origin = origin_of(plan)
    tensors = trained(origin)
    write(origin, tensors, {}, tmp_path / "out", training={"method": "test", "steps": 1})
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) == _planned_bytes(origin, tmp_path / "out")
    assert verify(tmp_path / "out").ok
    if dialect != "gguf":
        check_held(tmp_path / "out", tensors, same_scale=True)
    else:
        theirs = Checkpoint.open(tmp_path / "out")
        with Reader(theirs.inventory) as reader:
            ours = {w.name: theirs.read(reader, w) for w in theirs.weights if w.name in theirs.formats}
        assert sorted(map(_checksum, ours.values())) == sorted(_checksum(t.decode()) for t in tensors.values())
    assert source.exists()


def _checksum(values: Any) -> float:
    return float(np.sum(values, dtype=np.float64))


def _planned_bytes(origin: Origin, out: Path) -> int:
    content = json.loads((out / "halfbyte.json").read_text())
    assert content["training"]["method"] == "test"
    return sum(f["bytes"] for f in content["files"].values()) + (out / "halfbyte.json").stat().st_size


@pytest.mark.parametrize("dialect", ["halfbyte", "compressed-tensors", "modelopt"])
def test_a_student_of_a_checkpoint_can_be_exported_to_other_dialects(
    dialect: str, saved: Callable[[str], Path], quantized: Callable[..., Path], tmp_path: Path
) -> None:
    start = quantized(saved("qwen3_moe"))
    student = halfbyte.prepare(halfbyte.load(saved("qwen3_moe"), "float32"), start)
    with torch.no_grad():
        for master in student_of(student).masters:
            master.add_(0.02 * torch.randn(master.shape, generator=torch.manual_seed(1)))
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        seen = student.eval()(ids).logits
    tensors = {name: weight.final() for name, weight in student_of(student).weights.items()}
    halfbyte.export(student, tmp_path / "out", dialect)
    same = not get_dialect(dialect).spelling.global_scale_inv
    check_held(tmp_path / "out", tensors, same)
    with torch.no_grad():
        held = halfbyte.load(tmp_path / "out", "float32", dequantize=True)(ids).logits
    assert torch.equal(seen, held) if same else torch.allclose(seen, held, rtol=1e-5, atol=1e-5)
    assert verify(tmp_path / "out").ok


def test_trained_norms_are_written_as_they_were_rounded(
    saved: Callable[[str], Path], quantized: Callable[..., Path], tmp_path: Path
) -> None:
    student = halfbyte.prepare(halfbyte.load(saved("qwen3"), "float32"), quantized(saved("qwen3")), kept="norms")
    with torch.no_grad():
        for kept in student_of(student).kept.values():
            kept.master.mul_(1.01)
        ids = torch.arange(30).reshape(1, 30)
        seen = student.eval()(ids).logits
        halfbyte.export(student, tmp_path / "out")
        assert torch.equal(seen, halfbyte.load(tmp_path / "out", "float32", dequantize=True)(ids).logits)
    assert verify(tmp_path / "out", quantized(saved("qwen3"))).ok


def test_an_export_names_its_training_and_is_made_again_to_the_same_bytes(
    saved: Callable[[str], Path], quantized: Callable[..., Path], tmp_path: Path
) -> None:
    student = halfbyte.prepare(halfbyte.load(saved("qwen3"), "float32"), quantized(saved("qwen3")))
    for name in ("one", "two"):
        halfbyte.export(student, tmp_path / name, training={"method": "distill", "steps": 3, "tokens": 96})
    one, two = ((tmp_path / name / "halfbyte.json").read_bytes() for name in ("one", "two"))
    assert one == two and json.loads(one)["training"]["tokens"] == 96


def test_a_dialect_that_cannot_hold_the_format_is_refused_and_nothing_is_written(
    saved: Callable[[str], Path], quantized: Callable[..., Path], tmp_path: Path
) -> None:
    student = halfbyte.prepare(halfbyte.load(saved("qwen3"), "float32"), quantized(saved("qwen3"), "hif4"))
    with pytest.raises(PlanError, match="hif4"):
        halfbyte.export(student, tmp_path / "out", "modelopt")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(
    saved: Callable[[str], Path], quantized: Callable[..., Path], tmp_path: Path
) -> None:
    student = halfbyte.prepare(halfbyte.load(saved("qwen3"), "float32"), quantized(saved("qwen3")))
    next(student_of(student).masters).data[0, 0] = torch.nan
    with pytest.raises(HalfbyteError, match="not finite"):
        halfbyte.export(student, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(
    saved: Callable[[str], Path], quantized: Callable[..., Path], tmp_path: Path
) -> None:
    student = halfbyte.prepare(halfbyte.load(saved("qwen3"), "float32"), quantized(saved("qwen3")))
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(OutputError):
        halfbyte.export(student, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
