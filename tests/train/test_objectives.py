"""Losses and teachers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import halfbyte
from halfbyte.errors import HalfbyteError
from halfbyte.train import objectives
from halfbyte.train.objectives import Distillation, NextToken, SecondModel, SwitchedOff, distillation_loss, likeliest
from halfbyte.train.student import student_of

LOGITS = torch.randn(2, 7, 50, generator=torch.manual_seed(0))
OTHERS = torch.randn(2, 7, 50, generator=torch.manual_seed(1))


def divergence() -> torch.Tensor:
    p, q = functional.log_softmax(OTHERS.double(), -1), functional.log_softmax(LOGITS.double(), -1)
    return (p.exp() * (p - q)).sum(-1).mean()


def test_the_divergence_is_that_of_the_teacher_from_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.allclose(distillation_loss(LOGITS, OTHERS).double(), divergence())
    monkeypatch.setattr(objectives, "CHUNK", 150)
    assert torch.allclose(distillation_loss(LOGITS, OTHERS).double(), divergence())


def test_the_likeliest_tokens_and_the_rest_bound_the_divergence() -> None:
    parts = [distillation_loss(LOGITS, OTHERS, top_k).item() for top_k in (1, 5, 20, 50)]
    assert parts == sorted(parts) and parts[-1] == pytest.approx(divergence().item(), rel=1e-4)
    assert distillation_loss(LOGITS, likeliest(OTHERS, 5)).item() == parts[1]


def test_the_same_logits_have_no_divergence_and_no_gradient() -> None:
    student = OTHERS.clone().requires_grad_()
    loss = distillation_loss(student, OTHERS, 5)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and student.grad is not None
    assert student.grad.abs().max() < 1e-6


def test_two_vocabularies_are_refused() -> None:
    with pytest.raises(HalfbyteError, match="one vocabulary"):
        distillation_loss(LOGITS, OTHERS[..., :40])


def test_the_student_is_its_own_teacher_only_while_its_masters_stay(
    saved: Callable[[str], Path], quantized: Callable[..., Path]
) -> None:
    source = saved("qwen3")
    student = halfbyte.prepare(halfbyte.load(source, "float32"), quantized(source), master="original", kept="norms")
    with pytest.raises(HalfbyteError, match="its own teacher"):
        SwitchedOff(student)
    for weight in student_of(student).weights.values():
        weight.master.requires_grad_(False)
    ids = torch.arange(24).reshape(1, 24)
    other = SecondModel(halfbyte.load(source, "float32"))
    assert torch.equal(SwitchedOff(student)(ids), other(ids))
    loss, count = Distillation(other)(student, ids)
    assert loss > 0 and count == 24


def test_the_loss_of_a_task_is_that_of_the_model(saved: Callable[[str], Path]) -> None:
    model = halfbyte.load(saved("qwen3"), "float32")
    ids = torch.arange(24).reshape(1, 24)
    assert torch.allclose(NextToken()(model, ids)[0], model(ids, labels=ids).loss)
