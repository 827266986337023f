"""Training one layer at a time: never worse than the start, and continued to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import halfbyte
from halfbyte.errors import HalfbyteError, OutputError
from halfbyte.train.layer_files import LayerFiles
from halfbyte.train.local_training import LocalOptions, train_layers
from halfbyte.train.objectives import SecondModel, distillation_loss
from halfbyte.train.token_batches import TokenBatches
from halfbyte.verify.weights import verify
from small_models import hashes

TOKENS = torch.randint(0, 96, (40, 16), generator=torch.manual_seed(0))
BATCHES = TokenBatches(TOKENS[:32], TOKENS[32:], 4, 0)
Saved, Quantized = Callable[[str], Path], Callable[..., Path]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_no_layer_is_worse_and_the_model_is_nearer_to_its_source(
    name: str, saved: Saved, quantized: Quantized, tmp_path: Path
) -> None:
    start = quantized(saved(name), "mxfp4")
    done = train_layers(saved(name), start, tmp_path / "out", BATCHES, LocalOptions(30, check_every=10))
    assert len(done.before) == 2 and done.tokens == 32 * 16
    assert all(last <= first for first, last in zip(done.before, done.after, strict=True))
    assert sum(done.after) < sum(done.before)
    teacher = SecondModel(halfbyte.load(saved(name), "float32"))
    with torch.no_grad():
        before, after = (
            distillation_loss(halfbyte.load(p, "float32", dequantize=True)(TOKENS[32:]).logits, teacher(TOKENS[32:]))
            for p in (start, tmp_path / "out")
        )
    assert after < before
    assert verify(tmp_path / "out", start).ok and not (tmp_path / "out.training").exists()
    assert json.loads((tmp_path / "out" / "halfbyte.json").read_text())["training"]["method"] == "local"


def test_without_a_step_the_start_is_written_again(saved: Saved, quantized: Quantized, tmp_path: Path) -> None:
    start = quantized(saved("gpt_oss"), "mxfp4", "gpt-oss", "experts")
    done = train_layers(saved("gpt_oss"), start, tmp_path / "out", BATCHES, LocalOptions(1, rate=1e-30))
    assert done.before == done.after
    ids = TOKENS[:2]
    one, two = (halfbyte.load(p, "float32", dequantize=True) for p in (start, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)


def test_an_interrupted_training_continues_to_the_same_bytes(
    saved: Saved, quantized: Quantized, tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise StopError

    arguments = saved("qwen3_moe"), quantized(saved("qwen3_moe"), "nvfp4")
    options = LocalOptions(6)
    train_layers(*arguments, tmp_path / "whole", BATCHES, options)
    with pytest.raises(StopError):
        train_layers(*arguments, tmp_path / "out", BATCHES, options, progress=stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="--resume"):
        train_layers(*arguments, tmp_path / "out", BATCHES, options)
    with pytest.raises(OutputError, match="another training"):
        train_layers(*arguments, tmp_path / "out", BATCHES, LocalOptions(7), resume=True)
    train_layers(*arguments, tmp_path / "out", BATCHES, options, resume=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_models_that_do_not_belong_together_are_refused(saved: Saved, quantized: Quantized, tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="has 2 layers and the source 1"):
        train_layers(saved("qwen3_moe_wide"), quantized(saved("qwen3_moe")), tmp_path / "out", BATCHES)
    few = TokenBatches(TOKENS[:3], TOKENS[3:7], 4, 0)
    with pytest.raises(HalfbyteError, match="fewer sequences than a batch"):
        train_layers(saved("qwen3"), quantized(saved("qwen3")), tmp_path / "out", few)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


def test_layers_on_disk_are_read_as_they_were_written(tmp_path: Path) -> None:
    files = LayerFiles(tmp_path / "w", "a", resume=False)
    tensor = halfbyte.encode(torch.randn(8, 64).numpy(), "int4_g32")
    files.write(0, {"x": tensor})
    files.finish_layer(0, (2.0, 1.0))
    read = LayerFiles(tmp_path / "w", "a", resume=True)
    assert read.done == 1 and read.errors == [(2.0, 1.0)]
    assert (read.tensors()["x"].decode() == tensor.decode()).all() and read.tensors()[
        "x"
    ].scales.dtype == tensor.scales.dtype
