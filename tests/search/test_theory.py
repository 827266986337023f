"""Which blocks suit integers: the crest-factor theory of mixed blocks (arXiv 2605.31035) and what the encoder does."""

from __future__ import annotations

from math import exp, log10, pi, sqrt
from statistics import NormalDist

import numpy as np
import pytest

from formats.streams import gaussian
from halfbyte.search import encode

BLOCK = 16
CROSSOVER = 2.2243


def qsnr_int(kappa: float) -> float:
    """Signal to quantization noise in dB of integers -7..7 at crest factor kappa = amax / rms."""
    return 10 * log10(12 * 7**2 / kappa**2 * BLOCK / (BLOCK - 1))


def qsnr_fp(kappa: float) -> float:
    """The same of E2M1 with Gaussian elements: noise of the normal range and of the uniform steps below 1."""
    t = kappa / 6
    subnormal = 2 * NormalDist().cdf(t) - 1
    density = exp(-(t**2) / 2) / sqrt(2 * pi)
    normal = 1 - (subnormal - 2 * t * density)
    return -10 * log10((normal - kappa**2 / BLOCK) / 96 + kappa**2 * subnormal / 1728)


def crossover() -> float:
    """The crest factor where both grids give the same error."""
    low, high = 1.5, 3.5
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if qsnr_int(middle) > qsnr_fp(middle) else (low, middle)
    return low


def test_the_grids_cross_at_a_crest_factor_of_2_2243_and_21_03_db() -> None:
    assert crossover() == pytest.approx(CROSSOVER, abs=5e-5)
    assert qsnr_int(crossover()) == pytest.approx(21.03, abs=0.005)


def test_the_encoder_prefers_integers_below_the_crossover_and_fp4_above() -> None:
    x = gaussian()
    blocks = x.reshape(-1, BLOCK).astype(np.float64)
    kappa = np.abs(blocks).max(axis=1) / np.sqrt((blocks**2).mean(axis=1))
    integers = encode(x, "mixfp4", "absmax").codebooks.reshape(-1) == 1
    assert integers[kappa < CROSSOVER - 0.2].mean() > 0.75
    assert integers[kappa > CROSSOVER + 0.2].mean() < 0.25


def test_two_thirds_of_gaussian_blocks_lie_below_the_crossover() -> None:
    blocks = gaussian().reshape(-1, BLOCK)
    kappa = np.abs(blocks).max(axis=1) / np.sqrt((blocks**2).mean(axis=1))
    assert np.mean(kappa < CROSSOVER) == pytest.approx(0.63, abs=0.06)
