"""The loop: it lowers the divergence, keeps the best step, and continues to the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.errors import MeasurementError
from halfbyte.train.objectives import Distillation, NextToken, SecondModel
from halfbyte.train.student import student_of
from halfbyte.train.token_batches import TokenBatches
from halfbyte.train.training_loop import TrainingOptions, fit, rate_of, schedule
from halfbyte.train.training_state import TrainingState

Make = Callable[[], Any]


@pytest.fixture
def make(saved: Callable[[str], Path], quantized: Callable[..., Path]) -> Make:
    return lambda: halfbyte.prepare(halfbyte.load(saved("qwen3"), "float32"), quantized(saved("qwen3"), "mxfp4"))


@pytest.fixture
def objective(saved: Callable[[str], Path]) -> Distillation:
    return Distillation(SecondModel(halfbyte.load(saved("qwen3"), "float32")))


def batches() -> TokenBatches:
    tokens = torch.randint(0, 96, (40, 16), generator=torch.manual_seed(0))
    return TokenBatches(tokens[:32], tokens[32:], 4, 0)


def test_the_best_step_is_kept_and_better_than_the_start(make: Make, objective: Distillation) -> None:
    student = make()
    outcome = fit(student, objective, batches(), TrainingOptions(24), rate_of(student_of(student), "cell"))
    assert outcome.steps == 24 and outcome.tokens == 24 * 64 and sorted(outcome.held_out) == [0, 6, 12, 18, 24]
    best = outcome.held_out[outcome.best]
    assert best == min(outcome.held_out.values()) < 0.95 * outcome.held_out[0]


def test_a_rate_that_only_harms_leaves_the_start(make: Make, objective: Distillation) -> None:
    student = make()
    before = [master.clone() for master in student_of(student).masters]
    outcome = fit(student, objective, batches(), TrainingOptions(6), 1.0)
    assert outcome.best == 0
    assert all(torch.equal(a, b) for a, b in zip(before, student_of(student).masters, strict=True))


def test_an_interrupted_training_continues_to_the_same_bits(
    make: Make, objective: Distillation, tmp_path: Path
) -> None:
    class InterruptError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise InterruptError

    options = TrainingOptions(12, save_every=5, check_every=4)
    whole, first, second = make(), make(), make()
    wanted = fit(whole, objective, batches(), options, 1e-3)
    with pytest.raises(InterruptError):
        fit(first, objective, batches(), options, 1e-3, TrainingState(tmp_path / "w", "x", False), stop)
    outcome = fit(second, objective, batches(), options, 1e-3, TrainingState(tmp_path / "w", "x", True))
    assert outcome == wanted
    for a, b in zip(student_of(whole).masters, student_of(second).masters, strict=True):
        assert torch.equal(a, b)


class Poisoned(NextToken):
    """A loss that is a NaN from some call on."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def __call__(self, model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        loss, count = super().__call__(model, ids)
        self.calls -= 1
        return (loss if self.calls >= 0 else loss * torch.nan), count


def test_a_loss_that_is_no_number_stops_there_and_keeps_the_best(make: Make) -> None:
    student = make()
    outcome = fit(student, Poisoned(5), batches(), TrainingOptions(12, check_every=12), 1e-4)
    assert outcome.stopped == "the loss of step 4 is nan; the best step before it is kept"
    assert outcome.steps == 3 and all(torch.isfinite(m).all() for m in student_of(student).masters)


def test_a_start_that_is_no_number_is_refused(make: Make) -> None:
    with pytest.raises(MeasurementError, match="nothing to train"):
        fit(make(), Poisoned(0), batches(), TrainingOptions(2), 1e-4)


def test_the_schedule_begins_linearly_and_ends_near_zero() -> None:
    options = TrainingOptions(100, warmup=10)
    rates = [schedule(step, options) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[-1] < 0.001
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_gradients_of_parts_make_one_step(make: Make, objective: Distillation) -> None:
    whole, parts = make(), make()
    one, two = batches(), batches()
    two.batch_size = 2
    fit(whole, objective, one, TrainingOptions(2), 1e-4)
    fit(parts, objective, two, TrainingOptions(2, accumulate=2), 1e-4)
    for a, b in zip(student_of(whole).masters, student_of(parts).masters, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_norms_are_trained_where_they_are_asked_for(
    saved: Callable[[str], Path], quantized: Callable[..., Path], objective: Distillation
) -> None:
    start = quantized(saved("qwen3"), "mxfp4")
    student = halfbyte.prepare(halfbyte.load(saved("qwen3"), "float32"), start, kept="norms")
    norms = student_of(student).kept
    before = {name: kept.master.detach().clone() for name, kept in norms.items()}
    fit(student, NextToken(), batches(), TrainingOptions(12), 1e-3)
    assert norms.keys() == {n for n in before if n.endswith("norm.weight")} and len(norms) == 9
    assert all(not torch.equal(kept.master, before[name]) for name, kept in norms.items())
