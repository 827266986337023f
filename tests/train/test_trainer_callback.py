"""Distillation in transformers.Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import halfbyte
from halfbyte.errors import HalfbyteError
from halfbyte.train.student import student_of
from halfbyte.train.token_batches import TokenBatches

TOKENS = torch.randint(0, 96, (48, 16), generator=torch.manual_seed(0))


def trainer(model: Any, callback: Any, folder: Path, **more: Any) -> Any:
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True, seed=1,
        learning_rate=5e-5, lr_scheduler_type="cosine", **{"max_steps": 20, "save_strategy": "no", **more},
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in TOKENS[:40]]
    return transformers.Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])


@pytest.fixture
def student(saved: Callable[[str], Path], quantized: Callable[..., Path]) -> Any:
    return halfbyte.prepare(halfbyte.load(saved("qwen3"), "float32"), quantized(saved("qwen3"), "mxfp4"))


def test_the_trainer_lowers_the_divergence_and_keeps_the_best_step(
    student: Any, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    teacher = halfbyte.load(saved("qwen3"), "float32")
    distill = halfbyte.Distill(teacher, held_out=TokenBatches(TOKENS[:40], TOKENS[40:], 4, 0), check_every=10)
    trainer(student, distill, tmp_path / "t").train()
    assert sorted(distill.history) == [0, 10, 20]
    assert distill.history[distill.best] == min(distill.history.values()) < 0.95 * distill.history[0]
    halfbyte.export(student, tmp_path / "out")
    ids = TOKENS[40:42]
    with torch.no_grad():
        held = halfbyte.load(tmp_path / "out", "float32", dequantize=True)(ids).logits
        assert torch.equal(student.eval()(ids).logits, held)


def test_a_checkpoint_of_the_trainer_continues(
    student: Any, saved: Callable[[str], Path], quantized: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = halfbyte.load(saved("qwen3"), "float32")
    trainer(student, halfbyte.Distill(teacher), tmp_path / "t", save_strategy="steps", save_steps=10).train()
    again = halfbyte.prepare(halfbyte.load(saved("qwen3"), "float32"), quantized(saved("qwen3"), "mxfp4"))
    other = trainer(again, halfbyte.Distill(teacher), tmp_path / "t2", save_strategy="no")
    other.train(resume_from_checkpoint=str(tmp_path / "t" / "checkpoint-10"))
    for a, b in zip(student_of(student).masters, student_of(again).masters, strict=True):
        assert torch.equal(a, b)


def test_a_model_that_is_no_student_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = halfbyte.load(saved("qwen3"), "float32")
    with pytest.raises(HalfbyteError, match="prepare it first"):
        trainer(model, halfbyte.Distill(model), tmp_path / "t").train()
