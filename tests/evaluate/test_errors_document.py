from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.calibration import Importance, write_importance
from halfbyte.checkpoint import Reader
from halfbyte.errors import CheckpointError
from halfbyte.evaluate import tensor_errors
from halfbyte.formats import get_format
from halfbyte.source.checkpoint import Checkpoint
from small_models import DENSE_CONFIG, MOE_CONFIG, dense_tensors, linear, moe_tensors, recipe, run, write_checkpoint


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("errors") / "moe", moe_tensors(), MOE_CONFIG)


@pytest.fixture(scope="module")
def mixed(moe: Path) -> Path:
    run(moe, moe.parent / "mixed", linear("mixfp4"))
    return moe.parent / "mixed"


def by_numpy(out: Path, source: Path) -> dict[str, dict[str, Any]]:
    """The same numbers, the long way: everything decoded, block by block."""
    ours, theirs = Checkpoint.open(out), Checkpoint.open(source)
    found = {}
    with Reader(ours.inventory) as left, Reader(theirs.inventory) as right:
        for weight in theirs.weights:
            if weight.name not in ours.formats:
                continue
            tensor = ours.read_quantized(left, weight)
            dense = theirs.read(right, weight).astype(np.float64)
            error = tensor.decode().astype(np.float64) - dense
            scales, tables = tensor.format.decode_scales(tensor)  # type: ignore[attr-defined]
            blocks = dense.reshape(*scales.shape, -1)
            ends = np.array([np.abs(t.array).max() for t in tensor.format.codebooks])  # type: ignore[attr-defined]
            reach = scales * (ends[tables] if tables is not None else ends[0])
            found[weight.name] = {
                "relmse": (error**2).sum() / (dense**2).sum(),
                "max_error": np.abs(error).max(),
                "blocks": scales.size,
                "saturated_blocks": (np.abs(blocks).max(axis=-1) > reach).mean(),
                "tables": [] if tables is None else np.bincount(tables.ravel(), minlength=2) / tables.size,
                "stored_scales": sorted({float(v) for v in np.unique(tensor.format.split_scales(tensor.scales)[0])}),  # type: ignore[attr-defined]
                "error": error,
                "dense": dense,
            }
    return found


@pytest.mark.parametrize("fmt", ["nvfp4", "mixfp4", "mxfp4"])
def test_every_number_is_that_of_numpy(fmt: str, moe: Path, tmp_path: Path) -> None:
    run(moe, tmp_path / "out", recipe({"match": "linear", "format": fmt, "scale_search": "sweep"}))
    found, expected = tensor_errors(tmp_path / "out", moe), by_numpy(tmp_path / "out", moe)
    assert {w["name"] for w in found["weights"]} == set(expected)
    for weight in found["weights"]:
        want = expected[weight["name"]]
        assert weight["relmse"] == pytest.approx(want["relmse"], rel=1e-6)
        assert weight["sqnr_db"] == pytest.approx(-10 * math.log10(want["relmse"]), abs=1e-5)
        assert weight["max_error"] == pytest.approx(want["max_error"], rel=1e-6)
        assert weight["blocks"] == want["blocks"] == sum(weight["scales"]["counts"])
        assert weight["saturated_blocks"] == want["saturated_blocks"]
        assert list(weight["tables"].values()) == pytest.approx(list(want["tables"]))
        assert weight["scales"]["values"] == want["stored_scales"]
        if len(weight["shape"]) == 3:
            each = (want["error"] ** 2).sum((1, 2)) / (want["dense"] ** 2).sum((1, 2))
            assert weight["experts"] == pytest.approx(each.tolist(), rel=1e-6)


def test_classes_and_total_are_the_sums_of_their_weights(moe: Path, mixed: Path) -> None:
    found = tensor_errors(mixed, moe)
    weights, classes, total = found["weights"], found["classes"], found["total"]
    for key in ("parameters", "bytes", "blocks"):
        assert total[key] == sum(w[key] for w in weights) == sum(c[key] for c in classes)
    assert total["weights"] == len(weights) == sum(c["weights"] for c in classes)
    for entry in classes:
        members = [w for w in weights if w["role"] == entry["role"]]
        assert entry["max_error"] == max(w["max_error"] for w in members)
        share = sum(w["tables"]["e2m1"] * w["blocks"] for w in members) / entry["blocks"]
        assert entry["tables"]["e2m1"] == pytest.approx(share)
    ours = Checkpoint.open(mixed)
    assert total["parameters"] + found["kept"]["parameters"] == sum(math.prod(w.shape) for w in ours.weights)
    assert total["bytes"] + found["kept"]["bytes"] == ours.inventory.total_bytes
    json.dumps(found, allow_nan=False)


def test_importance_weighs_the_columns(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", dense_tensors(), DENSE_CONFIG)
    run(source, tmp_path / "out", linear("nvfp4"))
    name = "model.layers.0.mlp.down_proj.weight"
    columns = np.random.default_rng(0).random(256).astype(np.float32)
    write_importance(Importance({name: columns}, {name: np.array(5)}), tmp_path / "importance.safetensors")
    found = tensor_errors(tmp_path / "out", source, tmp_path / "importance.safetensors")
    want = by_numpy(tmp_path / "out", source)[name]
    weights = {w["name"]: w for w in found["weights"]}
    expected = (want["error"] ** 2 @ columns).sum() / (want["dense"] ** 2 @ columns).sum()
    assert weights[name]["weighted_relmse"] == pytest.approx(expected, rel=1e-5)
    assert weights["model.layers.1.mlp.down_proj.weight"]["weighted_relmse"] is None
    assert found["importance"] == "importance.safetensors"


def test_every_format_can_be_measured_and_threads_do_not_matter(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", dense_tensors(), DENSE_CONFIG)
    for name in ("hif4", "affine4_g64", "fp8_block128", "fp8_channel", "fp8_tensor", "int4_g32", "iq4_nl", "razer"):
        run(source, tmp_path / name, linear(name))
        one, four = (tensor_errors(tmp_path / name, source, threads=n) for n in (1, 4))
        assert one["weights"] == four["weights"]
        assert all(0 < w["relmse"] < 0.02 and w["format"] == get_format(name).name for w in one["weights"])


def test_other_dialects_give_the_same_numbers(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", dense_tensors(), DENSE_CONFIG)
    found = []
    for dialect in ("halfbyte", "modelopt"):
        run(source, tmp_path / dialect, linear("nvfp4"), dialect)
        found.append([w["relmse"] for w in tensor_errors(tmp_path / dialect, source)["weights"]])
    assert found[0] == pytest.approx(found[1])


def test_a_checkpoint_of_another_model_is_refused(mixed: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "src", dense_tensors(), DENSE_CONFIG)
    with pytest.raises(CheckpointError, match="is it the right source"):
        tensor_errors(mixed, other)


def test_a_checkpoint_that_is_not_quantized_has_no_errors(moe: Path) -> None:
    with pytest.raises(CheckpointError, match="no quantized weight"):
        tensor_errors(moe, moe)
