"""The loop of end-to-end training: deterministic, resumable, and it keeps the best step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from halfbyte.errors import MeasurementError
from halfbyte.formats import QuantizedTensor
from halfbyte.train.objectives import Objective
from halfbyte.train.straight_through import TrainedWeight
from halfbyte.train.student import Student, rounded_once, student_of
from halfbyte.train.token_batches import TokenBatches
from halfbyte.train.training_state import TrainingState

Progress = Callable[[int, int], None]
_RATE = {"cell": 0.0035, "original": 0.0035, "decoded": 0.01}


@dataclass(frozen=True)
class TrainingOptions:
    """How weights are trained, with AdamW (no weight decay) and a cosine to zero after ``warmup`` steps.

    ``rate``: the learning rate; None: a hundredth of the median step between two codes where masters are decoded
    values, a third of that where they start inside their cells. ``check_every``: steps between two looks at the
    held-out text (None: four looks in all); ``save_every``: steps between two saved states (None: as often).
    """

    steps: int = 300
    rate: float | None = None
    warmup: int = 10
    betas: tuple[float, float] = (0.9, 0.95)
    check_every: int | None = None
    save_every: int | None = None
    accumulate: int = 1


@dataclass
class TrainingOutcome:
    """What training did: ``held_out`` loss by step (0: the start), the best one, and where it stopped early."""

    steps: int
    tokens: int
    rate: float
    held_out: dict[int, float] = field(default_factory=dict)
    best: int = 0
    stopped: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def rate_of(student: Student, master: str) -> float:
    """A learning rate from the scales: the steps between two codes say how far a master has to go."""
    return rate_of_weights(student.weights.values(), master)


def rate_of_weights(weights: Iterable[TrainedWeight], master: str) -> float:
    """The same for some weights."""
    steps = np.concatenate([_steps(weight.tensor) for weight in weights])
    return float(np.median(steps[steps > 0])) * _RATE[master]


def _steps(tensor: QuantizedTensor) -> Any:
    """The mean distance between two codes of some blocks, as parts of their reach."""
    first, last = (
        tensor.format.value_range(tensor)[i].reshape(-1)[:: max(1, tensor.codes.size // 512)] for i in (0, 1)
    )
    return np.abs(last - first) / 12


def fit(
    model: Any,
    objective: Objective,
    batches: TokenBatches,
    options: TrainingOptions,
    rate: float,
    state: TrainingState | None = None,
    progress: Progress | None = None,
) -> TrainingOutcome:
    """Train a student in place; afterwards its masters are those of the best step by held-out loss, the start included.

    A loss that is not finite ends the training there: the best step stays, and ``stopped`` says where. With a
    ``state`` an interrupted training continues, to the same bits.
    """
    return _Run(model, objective, batches, options, rate, state, progress or (lambda done, total: None)).go()


class _Run:
    def __init__(
        self,
        model: Any,
        objective: Objective,
        batches: TokenBatches,
        options: TrainingOptions,
        rate: float,
        state: TrainingState | None,
        progress: Progress,
    ) -> None:
        self.model, self.objective, self.batches, self.options = model.eval(), objective, batches, options
        self.state, self.progress = state, progress
        self.masters = list(student_of(model).masters)
        self.optimizer = torch.optim.AdamW(self.masters, lr=rate, betas=options.betas, weight_decay=0.0)
        every = max(1, math.ceil(options.steps / 4))
        self.check_every = options.check_every or every
        self.save_every = options.save_every or every
        self.outcome = TrainingOutcome(0, 0, rate)
        self.best: list[torch.Tensor] = []

    def go(self) -> TrainingOutcome:
        """All steps from the saved one."""
        self._restore()
        if not self.outcome.held_out:
            self._check(0)
        for step in range(self.outcome.steps, self.options.steps):
            problem = self._step(step)
            if problem:
                self.outcome.stopped = problem
                break
            done = step + 1
            last = done == self.options.steps
            if (done % self.check_every == 0 or last) and not self._check(done):
                break
            if self.state is not None and (done % self.save_every == 0 or last):
                self._save()
            self.progress(done, self.options.steps)
        with torch.no_grad():
            for master, best in zip(self.masters, self.best, strict=True):
                master.copy_(best)
        return self.outcome

    def _step(self, step: int) -> str:
        """One update; what is wrong where it cannot be made."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.outcome.rate * schedule(step, self.options)
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.options.accumulate
        for part in range(parts):
            ids = self.batches.batch(step * parts + part).to(self.masters[0].device)
            loss, _ = self.objective(self.model, ids)
            if not torch.isfinite(loss):
                return f"the loss of step {step + 1} is {loss.item()}; the best step before it is kept"
            (loss / parts).backward()
            self.outcome.tokens += ids.numel()
        self.optimizer.step()
        self.outcome.steps = step + 1
        return ""

    def _check(self, step: int) -> bool:
        """Look at the held-out text, and keep the masters where it is the best so far; False where to stop."""
        loss = held_out_loss(self.model, self.objective, self.batches)
        if not math.isfinite(loss):
            if step == 0:
                raise MeasurementError("the held-out loss of the start is not finite, so there is nothing to train")
            self.outcome.stopped = f"the held-out loss after step {step} is {loss}; the best step before it is kept"
            return False
        self.outcome.held_out[step] = loss
        if step == 0 or loss < self.outcome.held_out[self.outcome.best]:
            self.outcome.best = step
            self.best = [master.detach().clone() for master in self.masters]
        return True

    def _save(self) -> None:
        assert self.state is not None
        self.state.save(
            {
                "masters": [master.detach() for master in self.masters],
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
                "outcome": self.outcome.to_dict(),
            }
        )

    def _restore(self) -> None:
        state = self.state.load() if self.state is not None else None
        if state is None:
            return
        self.optimizer.load_state_dict(state["optimizer"])
        self.outcome = TrainingOutcome(**state["outcome"])
        self.best = [best.to(m.device) for best, m in zip(state["best"], self.masters, strict=True)]
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                master.copy_(saved)


def schedule(step: int, options: TrainingOptions) -> float:
    """The part of the learning rate that a step (from 0) uses: a linear start, then a cosine to zero."""
    warmup = min(options.warmup, options.steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, options.steps - warmup)))


def held_out_loss(model: Any, objective: Objective, batches: TokenBatches) -> float:
    """The mean loss over all positions of the held-out sequences."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with rounded_once(model):
        for first in range(0, len(batches.held_out), batches.batch_size):
            loss, positions = objective(model, batches.held_out[first : first + batches.batch_size].to(device))
            total, count = total + float(loss) * positions, count + positions
    return total / count
