"""What training minimizes: the divergence from a teacher, or the loss of a task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

from halfbyte.errors import HalfbyteError
from halfbyte.train.student import student_of

CHUNK = 1 << 26
"""Logits in FP32 that are compared at a time, so that a large vocabulary needs no second copy of all of them."""


@dataclass
class TopK:
    """The likeliest tokens of a teacher at every position: ids [..., k], and their log-probabilities."""

    ids: torch.Tensor
    log_probs: torch.Tensor


class Teacher(Protocol):
    """Gives logits [batch, length, vocabulary], or the likeliest tokens, for ids [batch, length]."""

    def __call__(self, ids: torch.Tensor) -> torch.Tensor | TopK: ...  # noqa: D102


class Objective(Protocol):
    """A loss over a batch: its mean over positions, and how many positions these are."""

    name: str

    def __call__(self, model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, int]: ...  # noqa: D102


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor | TopK, top_k: int | None = None) -> torch.Tensor:
    """KL(teacher || student) in nats at temperature 1, mean over positions; computed in FP32.

    ``student`` and ``teacher`` are logits [..., vocabulary]. With ``top_k``, or a ``TopK`` teacher, the teacher's
    likeliest tokens count one by one and all others as one event, so the result is at most the full divergence.
    """
    if isinstance(teacher, TopK):
        return _top_divergence(student, teacher)
    if student.shape != teacher.shape:
        raise HalfbyteError(
            f"teacher and student have logits of shapes {list(teacher.shape)} and {list(student.shape)}; they need one "
            "vocabulary"
        )
    if top_k is not None:
        return _top_divergence(student, likeliest(teacher, top_k))
    rows, vocabulary = student.reshape(-1, student.shape[-1]), student.shape[-1]
    others = teacher.reshape(-1, vocabulary)
    step = max(1, CHUNK // vocabulary)
    total = rows.new_zeros((), dtype=torch.float32)
    for first in range(0, len(rows), step):
        q = functional.log_softmax(rows[first : first + step].float(), dim=-1)
        p = functional.log_softmax(others[first : first + step].float(), dim=-1)
        total = total + functional.kl_div(q, p, reduction="sum", log_target=True)
    return total / len(rows)


def likeliest(logits: torch.Tensor, count: int) -> TopK:
    """The ``count`` likeliest tokens at every position."""
    log_probs = functional.log_softmax(logits.float(), dim=-1)
    values, ids = log_probs.topk(min(count, logits.shape[-1]), dim=-1)
    return TopK(ids, values)


def _top_divergence(student: torch.Tensor, teacher: TopK) -> torch.Tensor:
    q = functional.log_softmax(student.float(), dim=-1).gather(-1, teacher.ids)
    p = teacher.log_probs.float()
    tiny = torch.finfo(torch.float32).tiny
    # what is left to all other tokens, one event
    rest_p, rest_q = ((1 - x.exp().sum(-1)).clamp_min(tiny) for x in (p, q))
    divergence = (p.exp() * (p - q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())
    return divergence.mean()


class SecondModel:
    """A teacher that is another model with the same vocabulary."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """The other model's logits."""
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


class SwitchedOff:
    """A teacher that is the student itself with its masters unrounded: for masters that stay, while others learn."""

    def __init__(self, model: Any) -> None:
        self.model = model
        if any(weight.master.requires_grad for weight in student_of(model).weights.values()):
            raise HalfbyteError(
                "a student whose masters are trained cannot be its own teacher, since both would move; freeze the "
                "masters, or give a second model"
            )

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """The student's logits without rounding."""
        with switched_off(self.model):
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


@contextlib.contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """Within this context a student computes with its masters, unrounded."""
    weights = student_of(model).weights.values()
    before = [weight.enabled for weight in weights]
    try:
        for weight in weights:
            weight.enabled = False
        yield
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.enabled = value


@dataclass
class Distillation:
    """KL(teacher || student), over the ``top_k`` likeliest tokens of the teacher where given."""

    teacher: Teacher
    top_k: int | None = None
    name: str = "distill"

    def __call__(self, model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The mean over all positions of a batch."""
        logits = model(input_ids=ids, use_cache=False).logits
        return distillation_loss(logits, self.teacher(ids), self.top_k), ids.numel()


@dataclass
class NextToken:
    """Cross-entropy of the tokens that come: the loss of language models, for quantization-aware training."""

    name: str = "task"

    def __call__(self, model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The mean over all predicted positions of a batch."""
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        targets = ids[:, 1:]
        loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1))
        return loss, targets.numel()
