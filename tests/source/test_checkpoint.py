from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from halfbyte.checkpoint import Reader
from halfbyte.errors import CheckpointError
from halfbyte.source.checkpoint import Checkpoint
from small_models import MOE_CONFIG, linear, moe_tensors, recipe, run, write_checkpoint

DIALECTS = ["halfbyte", "compressed-tensors"]
FUSED = "model.language_model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "moe", moe_tensors(), MOE_CONFIG)


def test_both_spellings_of_experts_are_one_weight_with_the_same_values(moe: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "moe", moe_tensors(per_expert=True), MOE_CONFIG)
    found = [Checkpoint.open(folder) for folder in (moe, other)]
    assert {w.name: w.shape for w in found[0].weights} == {w.name: w.shape for w in found[1].weights}
    for checkpoint in found:
        weight = next(w for w in checkpoint.weights if w.name == FUSED)
        with Reader(checkpoint.inventory) as reader:
            assert checkpoint.read(reader, weight).tobytes() == moe_tensors()[FUSED].tobytes()
            assert checkpoint.read(reader, weight, 1, 3).tobytes() == moe_tensors()[FUSED][1:3].tobytes()


def test_a_plain_checkpoint_has_no_dialect_and_reads_its_own_dtype(moe: Path) -> None:
    checkpoint = Checkpoint.open(moe)
    assert checkpoint.dialect is None and checkpoint.formats == {}
    weight = next(w for w in checkpoint.weights if w.name == "lm_head.weight")
    with Reader(checkpoint.inventory) as reader:
        rows = checkpoint.read(reader, weight, 8, 24)
    assert rows.dtype.name == "bfloat16" and rows.tobytes() == moe_tensors()["lm_head.weight"][8:24].tobytes()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fmt", ["nvfp4", "mixfp4", "int4_asym_g32", "fp8_tensor", "fp8_channel", "fp8_block128"])
def test_slices_of_a_quantized_weight_are_its_slices(moe: Path, tmp_path: Path, fmt: str, dialect: str) -> None:
    run(moe, tmp_path / "out", linear(fmt), dialect)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.dialect is not None and checkpoint.dialect.name == dialect
    with Reader(checkpoint.inventory) as reader:
        for weight in (w for w in checkpoint.weights if w.name in checkpoint.formats):
            whole = checkpoint.read(reader, weight)
            assert whole.dtype == np.float32 and whole.shape == weight.shape
            step = 1 if len(weight.shape) == 3 else 128
            parts = [
                checkpoint.read(reader, weight, first, min(first + step, weight.shape[0]))
                for first in range(0, weight.shape[0], step)
            ]
            assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_quantized_checkpoint_has_the_weights_roles_and_groups_of_its_source(
    moe: Path, tmp_path: Path, dialect: str
) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"), dialect)
    source, ours = Checkpoint.open(moe), Checkpoint.open(tmp_path / "out")
    assert {w.name: (w.shape, w.role, w.group, w.row_parts) for w in ours.weights} == {
        w.name: (w.shape, w.role, w.group, w.row_parts) for w in source.weights
    }


def test_both_dialects_hold_the_same_values(moe: Path, tmp_path: Path) -> None:
    values = []
    for dialect in DIALECTS:
        # powers of two have exact reciprocals, so a divisor and a multiplier mean the same number
        run(moe, tmp_path / dialect, linear("mixfp4", global_scale="power_of_two"), dialect)
        checkpoint = Checkpoint.open(tmp_path / dialect)
        with Reader(checkpoint.inventory) as reader:
            values.append({w.name: checkpoint.read(reader, w) for w in checkpoint.weights})
    assert values[0].keys() == values[1].keys()
    assert all(np.array_equal(values[0][name], values[1][name]) for name in values[0])


def test_experts_of_one_stack_in_two_formats_cannot_be_read_as_one_weight(moe: Path, tmp_path: Path) -> None:
    chosen = recipe({"match": "experts", "format": "nvfp4"}, {"match": "attention", "format": "mxfp4"})
    run(moe, tmp_path / "out", chosen, "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        if group["format"].startswith("mxfp4"):
            group["targets"].append(r"re:.*experts\.3\.down_proj$")
        group["targets"] = [t.replace(r"experts\.\d+\.down", r"experts\.[012]\.down") for t in group["targets"]]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"experts\.down_proj .* have different formats"):
        Checkpoint.open(tmp_path / "out")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_reading_a_weight_that_lost_a_tensor_is_an_error(moe: Path, tmp_path: Path, dialect: str) -> None:
    run(moe, tmp_path / "out", linear("nvfp4"), dialect)
    checkpoint = Checkpoint.open(tmp_path / "out")
    weight = next(w for w in checkpoint.weights if w.name == FUSED)
    lost = next(n for n in checkpoint.inventory.tensors if "gate_up" in n or "experts.3.up_proj" in n)
    del checkpoint.inventory.tensors[lost]
    with Reader(checkpoint.inventory) as reader, pytest.raises(CheckpointError, match="lacks the tensor"):
        checkpoint.read(reader, weight)
