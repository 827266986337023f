"""A model that was folded while it was quantized computes what its source computes, but for the quantization."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import halfbyte
from folded import importance_of
from halfbyte.calibration import write_importance
from halfbyte.checkpoint import Reader
from halfbyte.cli import main
from halfbyte.plan.smoothing_use import stored_smoothings
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.smoothing import SMOOTHING_FILE, read_scales
from small_models import read_file, write_file

RECIPE = """
rules:
  - {match: [attention, linear_attention.qkv, linear_attention.z, shared_expert], format: int4_g128,
     scale_search: absmax, transform: awq, optional: true}
  - {match: [mlp, experts.down], format: int4_g128, scale_search: absmax, transform: awq, optional: true}
"""


def in_fp32(source: Path, out: Path) -> Path:
    """A copy whose tensors are FP32, so that what is kept is not rounded again."""
    shutil.copytree(source, out, copy_function=shutil.copyfile)
    out.chmod(0o755)
    (out / "config.json").write_text((source / "config.json").read_text().replace('"bfloat16"', '"float32"'))
    write_file(out / "model.safetensors", {name: a.astype(np.float32) for name, a in read_file(source).items()})
    return out


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.arange(100, 356)[None], use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("qwen3-tiny-wiki", 12), ("qwen35moe-tiny-wiki", 12)])
def test_folded_weights_give_the_logits_of_the_source(shared: Path, tmp_path: Path, name: str, least: int) -> None:
    source = in_fp32(shared / "data" / "models" / name, tmp_path / "source")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    write_importance(importance_of(source), tmp_path / "importance.safetensors")
    out = tmp_path / "out"
    more = ["--recipe", str(tmp_path / "recipe.yaml"), "--importance", str(tmp_path / "importance.safetensors")]
    assert main(["quantize", str(source), str(out), *more, "--verify", "--json"]) == 0
    assert sum((scale != 1).any() for scale in read_scales(out / SMOOTHING_FILE).values()) >= least
    before = logits(halfbyte.load(source, "float32"))
    model = halfbyte.load(out, "float32", dequantize=True)
    rough = logits(model)
    # what is quantized gets the folded source's values; everything else is as the files have it
    ours, origin = Checkpoint.open(out), Checkpoint.open(source)
    parameters = dict(model.named_parameters())
    with Reader(origin.inventory) as reader, torch.no_grad():
        smoothings = stored_smoothings(out, origin, reader)
        for weight in (w for w in origin.weights if w.name in ours.formats):
            dense = origin.read(reader, weight)
            parameters[weight.name].copy_(
                torch.from_numpy(smoothings[weight.name].apply(dense) if weight.name in smoothings else dense)
            )
    exact = logits(model)
    assert float((exact - before).abs().max()) < 1e-4
    assert float((rough - before).abs().max()) > 0.1
