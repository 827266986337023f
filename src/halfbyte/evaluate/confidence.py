"""How sure a number is: bootstrap over windows, exact tests on paired answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.evaluate.divergence import TokenScores

RESAMPLES, SEED = 1000, 0
FEWEST = 5
"""Windows below which resampling them says nothing."""
_LARGEST_EXPONENT = 709.0

Interval = list[float] | None
Floats = NDArray[np.float64]


class Bootstrap:
    """Resamples windows (or conversations), since tokens of one window depend on each other.

    The same seed draws the same windows for every checkpoint of a passage, so that differences are paired.
    Intervals are percentile intervals of 95 %.
    """

    def __init__(self, window: NDArray[np.int64]) -> None:
        self.window = window
        self.count = int(window.max()) + 1
        self.tokens = np.bincount(window, minlength=self.count).astype(np.float64)
        self.usable = int(np.count_nonzero(self.tokens)) >= FEWEST
        draw = np.random.default_rng(SEED)
        # how often each window is in each resample
        self.times = draw.multinomial(self.count, np.full(self.count, 1 / self.count), size=RESAMPLES).astype(float)

    def means(self, values: NDArray[Any]) -> Floats:
        """The mean over tokens in each resample."""
        sums = np.bincount(self.window, weights=values, minlength=self.count)
        return np.asarray((self.times @ sums) / (self.times @ self.tokens))

    def mean(self, values: NDArray[Any]) -> Interval:
        """Interval of the mean of a value per token."""
        return _interval(self.means(values)) if self.usable else None

    def quantiles(self, values: NDArray[Any], levels: Sequence[float]) -> list[Interval]:
        """Intervals of quantiles of a value per token."""
        if not self.usable:
            return [None] * len(levels)
        order = np.argsort(values, kind="stable")
        ordered, window = values[order], self.window[order]
        quantiles = np.empty((len(self.times), len(levels)))
        for i, times in enumerate(self.times):
            below = np.cumsum(times[window])
            at = np.searchsorted(below, np.asarray(levels) * below[-1])
            quantiles[i] = ordered[np.minimum(at, len(ordered) - 1)]
        return [_interval(column) for column in quantiles.T]

    def same(self, one: NDArray[Any], other: NDArray[Any]) -> bool:
        """Whether the difference of two means, paired token by token, may be zero."""
        interval = self.mean(one - other)
        return interval is None or interval[0] <= 0 <= interval[1]


def _interval(values: Floats) -> list[float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return [float(low), float(high)]


def divergence_intervals(scores: TokenScores, bootstrap: Bootstrap) -> dict[str, Interval]:
    """``kl_ci`` of a row: an interval for each number of ``kl``."""
    assert scores.kl is not None and scores.same_top is not None
    median, p90, p99 = bootstrap.quantiles(scores.kl, (0.5, 0.9, 0.99))
    mean, top = bootstrap.mean(scores.kl), bootstrap.mean(scores.same_top)
    return {"mean": mean, "median": median, "p90": p90, "p99": p99, "top1": top}


def exponential(interval: Interval) -> Interval:
    """The interval of exp(x); None where no number holds it."""
    return [math.exp(bound) for bound in interval] if interval and max(interval) < _LARGEST_EXPONENT else None


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: of the questions that one of two answers right, half go either way."""
    n, term, tail = only_a + only_b, 1, 0
    for i in range(min(only_a, only_b) + 1):
        tail += term
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * tail / (1 << n))


def wilson(right: int, questions: int) -> list[float]:
    """95 % interval of a share (E. B. Wilson, 1927), which behaves at 0 and 1 too."""
    z = 1.959963984540054
    share, more = right / questions, z * z / questions
    middle = (share + more / 2) / (1 + more)
    half = z / (1 + more) * math.sqrt(share * (1 - share) / questions + more / (4 * questions))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def paired(task: str, a: str, b: str, correct: Mapping[str, str]) -> dict[str, Any]:
    """Compare the answers ("0" and "1" per question) of two checkpoints by name."""
    only_a = sum(x > y for x, y in zip(correct[a], correct[b], strict=True))
    only_b = sum(x < y for x, y in zip(correct[a], correct[b], strict=True))
    p = mcnemar(only_a, only_b)
    return {"task": task, "a": a, "b": b, "only_a": only_a, "only_b": only_b, "p": p, "significant": p < 0.05}
