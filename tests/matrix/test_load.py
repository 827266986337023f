"""halfbyte.load reads the dialects of engines: a model's parameters are the decoded weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from halfbyte.checkpoint import Reader
from halfbyte.source.checkpoint import Checkpoint
from small_models import linear, run

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.parametrize("model", ["qwen3-tiny-wiki", "qwen35moe-tiny-wiki"])
@pytest.mark.parametrize(("dialect", "fmt"), [("modelopt", "nvfp4"), ("mlx", "affine4_g64"), ("fp8", "fp8_block128")])
def test_parameters_are_the_decoded_weights(shared: Path, tmp_path: Path, model: str, dialect: str, fmt: str) -> None:
    from halfbyte.runtime import load

    run(shared / "data" / "models" / model, tmp_path / "out", linear(fmt, if_not_divisible="keep"), dialect)
    checkpoint = Checkpoint.open(tmp_path / "out")
    found = dict(load(tmp_path / "out", "float32", dequantize=True).named_parameters())
    assert len(checkpoint.formats) > 30
    with Reader(checkpoint.inventory) as reader:
        for weight in (w for w in checkpoint.weights if w.name in checkpoint.formats):
            values = found[weight.name.replace("language_model.", "")].detach().numpy()
            np.testing.assert_array_equal(values, checkpoint.read(reader, weight), weight.name)
