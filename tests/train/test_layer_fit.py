"""Fitting one layer: the best masters stay, the start included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from halfbyte.train.layer_fit import fit_layer
from halfbyte.train.training_loop import TrainingOptions


def fitted(target: float, rate: float, steps: int = 40, broken: bool = False) -> tuple[float, float, float]:
    master = torch.nn.Parameter(torch.zeros(1))
    weights = cast(Any, {"w": SimpleNamespace(master=master)})

    def error(first: int) -> torch.Tensor:
        return (master - target).square().sum() * (torch.nan if broken and first < 8 else 1)

    options = TrainingOptions(steps, check_every=5)
    batches = range(0, 8, 2), range(8, 12, 2)
    start, best = fit_layer(weights, error, batches, rate, options, np.random.default_rng(0))
    return start, best, master.item()


def test_the_error_falls_and_the_best_masters_stay() -> None:
    start, best, master = fitted(0.5, 0.05)
    assert best < 0.2 * start and np.isclose((master - 0.5) ** 2, best, rtol=1e-4)


def test_a_rate_that_only_harms_leaves_the_start() -> None:
    start, best, master = fitted(1e-3, 10.0, steps=10)
    assert start == best and master == 0


def test_an_error_that_is_no_number_ends_at_the_best_step() -> None:
    start, best, master = fitted(0.5, 0.05, broken=True)
    assert start == best and master == 0
