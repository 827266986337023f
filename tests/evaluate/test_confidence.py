from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from halfbyte.evaluate.confidence import Bootstrap, mcnemar, paired, wilson


def windows(count: int, size: int) -> NDArray[Any]:
    return np.repeat(np.arange(count), size)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (0, 1, 1.0), (0, 5, 0.0625), (1, 9, 0.021484375), (10, 10, 1.0), (3, 12, 0.03515625)],
)
def test_mcnemar_s_exact_p_is_that_of_the_binomial_distribution(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a) == pytest.approx(p)


def test_mcnemar_takes_thousands_of_questions() -> None:
    n, z = 6000, 150 / math.sqrt(6000)
    assert mcnemar(2925, 3075) == pytest.approx(math.erfc((z * math.sqrt(n) - 1) / math.sqrt(2 * n)), rel=0.01)
    assert 0 <= mcnemar(0, 6000) < 1e-300


def test_pairs_count_the_questions_that_only_one_answers() -> None:
    found = paired("t", "a", "b", {"a": "110100", "b": "010111"})
    assert (found["only_a"], found["only_b"], found["p"], found["significant"]) == (1, 2, 1.0, False)


@pytest.mark.parametrize(
    ("right", "questions", "expected"),
    [(0, 10, (0.0, 0.27753)), (10, 10, (0.72247, 1.0)), (5, 10, (0.23659, 0.76341)), (700, 1000, (0.67088, 0.72759))],
)
def test_shares_have_wilson_s_interval(right: int, questions: int, expected: tuple[float, float]) -> None:
    assert wilson(right, questions) == pytest.approx(expected, abs=2e-5)


def test_the_interval_of_a_mean_is_the_one_of_theory_for_independent_tokens() -> None:
    values = np.random.default_rng(1).normal(3, 2, 20_000)
    found = Bootstrap(windows(200, 100)).mean(values)
    assert found is not None
    half = 1.96 * 2 / math.sqrt(20_000)
    assert found == pytest.approx([values.mean() - half, values.mean() + half], abs=0.15 * half)


def test_tokens_of_a_window_that_depend_on_each_other_make_the_interval_wider() -> None:
    values = np.repeat(np.random.default_rng(1).normal(3, 2, 200), 100)
    found = Bootstrap(windows(200, 100)).mean(values)
    assert found is not None
    half = 1.96 * 2 / math.sqrt(200)
    assert found[1] - found[0] == pytest.approx(2 * half, rel=0.15)


def test_quantiles_have_intervals_around_them() -> None:
    values = np.random.default_rng(2).random(50_000)
    levels = (0.5, 0.9, 0.99)
    found = Bootstrap(windows(500, 100)).quantiles(values, levels)
    for interval, level in zip(found, levels, strict=True):
        assert interval is not None
        low, high = interval
        assert low < np.quantile(values, level) < high
        assert high - low == pytest.approx(2 * 1.96 * math.sqrt(level * (1 - level) / 50_000), rel=0.2)


def test_pairing_finds_differences_that_single_intervals_hide() -> None:
    rng = np.random.default_rng(3)
    base = np.repeat(rng.exponential(1, 100), 50)
    better, noise = base * 0.99, base + rng.normal(0, 0.001, 5000)
    bootstrap = Bootstrap(windows(100, 50))
    one, other = bootstrap.mean(base), bootstrap.mean(better)
    assert one is not None and other is not None and other[1] > one[0]
    assert not bootstrap.same(base, better)
    assert bootstrap.same(base, noise)


def test_a_few_windows_say_nothing() -> None:
    bootstrap = Bootstrap(windows(4, 100))
    values = np.random.default_rng(0).random(400)
    assert bootstrap.mean(values) is None and bootstrap.quantiles(values, (0.5,)) == [None]
    assert bootstrap.same(values, values + 1)


def test_the_same_numbers_come_out_every_time() -> None:
    values = np.random.default_rng(0).random(1000)
    one, other = (Bootstrap(windows(10, 100)).mean(values) for _ in range(2))
    assert one == other
