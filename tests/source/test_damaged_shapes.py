"""Codes and scales of shapes that no weight has are refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.errors import CheckpointError
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.overview import overview
from small_models import DENSE_CONFIG, dense_tensors, read_file, run, write_checkpoint, write_file

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
CODES = {
    "compressed-tensors": f"{WEIGHT}_packed",
    "modelopt": WEIGHT,
    "halfbyte": f"{WEIGHT}_codes",
    "mlx": WEIGHT,
}
SCALES = {"compressed-tensors": "_scale", "modelopt": "_scale", "halfbyte": "_scales", "mlx": ".scales"}


@pytest.mark.parametrize("shape", [(), (0,), (-1,), (1, 1, 1, -1, 1), (1, 128, -1)])
@pytest.mark.parametrize("dialect", CODES)
def test_codes_and_scales_of_wrong_shapes(dialect: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    recipe = "mxfp4" if dialect == "mlx" else "nvfp4"
    run(write_checkpoint(tmp_path / "m", dense_tensors(), DENSE_CONFIG), tmp_path / "q", recipe, dialect)
    before = read_file(tmp_path / "q")
    scales = (WEIGHT if dialect != "mlx" else WEIGHT.removesuffix(".weight")) + SCALES[dialect]
    for name in (CODES[dialect], scales):
        flat = before[name].reshape(-1)
        array = flat[0] if shape == () else flat[:0] if shape == (0,) else flat.reshape(shape)
        write_file(tmp_path / "q" / "model.safetensors", {**before, name: array})
        with pytest.raises(CheckpointError, match="q_proj"):
            overview(Checkpoint.open(tmp_path / "q"))


@pytest.mark.parametrize("shape", [(1, 128, -1), (128, 1, -1)])
def test_a_matrix_of_mlx_that_looks_like_a_stack(shape: tuple[int, ...], tmp_path: Path) -> None:
    run(write_checkpoint(tmp_path / "m", dense_tensors(), DENSE_CONFIG), tmp_path / "q", "mxfp4", "mlx")
    before = read_file(tmp_path / "q")
    write_file(tmp_path / "q" / "model.safetensors", {**before, WEIGHT: before[WEIGHT].reshape(shape)})
    with pytest.raises(CheckpointError, match="q_proj"):
        overview(Checkpoint.open(tmp_path / "q"))
