"""A quantized checkpoint in another dialect keeps its codes; what cannot be kept is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import halfbyte
from halfbyte.checkpoint import Reader
from halfbyte.cli import main
from halfbyte.demo import MODEL
from halfbyte.errors import PlanError
from halfbyte.view import Checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    halfbyte.quantize(MODEL, folder / "mxfp4", "mxfp4", dialect="compressed-tensors")
    halfbyte.quantize(MODEL, folder / "nvfp4", "nvfp4", dialect="compressed-tensors")
    halfbyte.quantize(MODEL, folder / "mixfp4", "mixfp4")
    return folder


@pytest.mark.parametrize("target", ["halfbyte", "mlx"])
def test_codes_and_scales_are_the_same_in_the_other_dialect(made: Path, tmp_path: Path, target: str) -> None:
    halfbyte.convert(made / "mxfp4", tmp_path / "out", target)
    before, after = Checkpoint.open(made / "mxfp4"), Checkpoint.open(tmp_path / "out")
    assert set(before.formats) == set(after.formats)
    weights = {w.name: w for w in after.weights}
    with Reader(before.inventory) as one, Reader(after.inventory) as two:
        for weight in (w for w in before.weights if w.name in before.formats):
            a = before.read_quantized(one, weight)
            b = after.read_quantized(two, weights[weight.name])
            np.testing.assert_array_equal(a.codes, b.codes)
            np.testing.assert_array_equal(a.scales, b.scales)
    assert halfbyte.verify(tmp_path / "out", made / "mxfp4").ok


def _bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    inventory = halfbyte.Inventory.open(folder)
    with Reader(inventory) as reader:
        return {n: (t.dtype, t.shape, reader.read(n).tobytes()) for n, t in inventory.tensors.items()}


def test_there_and_back_gives_the_same_tensors(made: Path, tmp_path: Path) -> None:
    halfbyte.convert(made / "mxfp4", tmp_path / "there", "halfbyte")
    halfbyte.convert(tmp_path / "there", tmp_path / "back", "compressed-tensors")
    assert _bytes(tmp_path / "back") == _bytes(made / "mxfp4")


def test_only_tensor_scales_are_rounded_where_a_dialect_stores_their_reciprocals(made: Path, tmp_path: Path) -> None:
    halfbyte.convert(made / "mixfp4", tmp_path / "there", "compressed-tensors")
    halfbyte.convert(tmp_path / "there", tmp_path / "back", "halfbyte")
    before, after = _bytes(made / "mixfp4"), _bytes(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all("_tensor_scale" in name for name in before if before[name] != after[name])


def test_weights_that_the_dialect_cannot_hold_are_named(made: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"modelopt cannot hold .*in_proj_qkv.* and 28 more \(mixfp4\)"):
        halfbyte.convert(made / "mixfp4", tmp_path / "out", "modelopt")
    assert not (tmp_path / "out").exists()


def test_they_can_be_requantized_and_the_error_is_told(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["convert", str(made / "mixfp4"), out, "--dialect", "modelopt", "--requantize", "nvfp4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {entry["format"] for entry in told["carried"]} == {"nvfp4"}
    assert not any(entry["lossless"] for entry in told["carried"])
    assert 0.001 < told["relmse"] < 0.01


def test_a_checkpoint_that_is_not_quantized_has_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no quantized weights"):
        halfbyte.convert(MODEL, tmp_path / "out", "modelopt")
