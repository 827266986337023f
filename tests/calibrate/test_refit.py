"""Targets of rounding: least squares against what the quantized model feeds a weight."""

from __future__ import annotations

import numpy as np
import torch

from halfbyte.calibrate.refit import DAMPING, EXPERT_DAMPING, InputSums, chunks, objective


def _sums(x: torch.Tensor, other: torch.Tensor, factor: torch.Tensor | None = None) -> InputSums:
    sums = InputSums.zeros(x.shape[1], other.shape[1], torch.device("cpu"))
    for some in chunks(len(x), 7):
        sums.add(x[some], other[some], None if factor is None else factor[some])
    return sums


def test_a_reader_aims_at_what_it_gave_for_the_source_s_inputs() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=rng)
    seen = x + 0.1 * torch.randn(50, 8, generator=rng)
    correction = _sums(seen, x - seen).correction(expert=False)
    assert correction is not None
    weight = torch.randn(5, 8, generator=rng, dtype=torch.float64)
    h = seen.double().T @ seen.double()
    damping = DAMPING * h.diagonal().mean()
    expected = weight @ (x - seen).double().T @ seen.double() @ torch.linalg.inv(h + damping * torch.eye(8))
    torch.testing.assert_close(weight @ correction, expected, rtol=1e-4, atol=1e-5)
    before, after = ((seen.double() @ w.T - x.double() @ weight.T).norm() for w in (weight, weight + expected))
    assert after < before


def test_a_writer_takes_what_the_stream_lacks_times_the_factor_of_its_output() -> None:
    rng = torch.Generator().manual_seed(1)
    x, rho, a = torch.randn(60, 4, generator=rng), torch.randn(60, 3, generator=rng), torch.rand(60, generator=rng)
    change = _sums(x, rho, a).correction(expert=True)
    assert change is not None
    scaled = (x * a[:, None]).double()
    h = scaled.T @ scaled
    share = DAMPING + EXPERT_DAMPING * 4 / 60
    expected = rho.double().T @ scaled @ torch.linalg.inv(h + share * h.diagonal().mean() * torch.eye(4))
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)


def test_without_tokens_there_is_no_correction() -> None:
    sums = InputSums.zeros(4, 4, torch.device("cpu"))
    assert sums.correction(expert=True) is None and sums.finite and sums.count == 0


def test_sums_are_those_that_statistics_hold() -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    sums = _sums(x, torch.zeros(2, 2))
    assert (sums.count, sums.amax) == (2, 3.0)
    np.testing.assert_array_equal(sums.squares.numpy(), [10.0, 4.25])
    np.testing.assert_allclose(sums.mean(), (x.T @ x).numpy() / 2)


def test_the_objective_is_that_of_outputs_and_samples_rows_evenly() -> None:
    rng = np.random.default_rng(0)
    error, target = (rng.standard_normal((64, 6)).astype(np.float32) for _ in range(2))
    a = rng.standard_normal((9, 6))
    h = (a.T @ a).astype(np.float32)
    found = objective(error, target, h)
    np.testing.assert_allclose(found, [np.trace(w @ h @ w.T) for w in (error, target)], rtol=1e-5)
    assert abs(objective(error, target, h, rows=32)[0] / found[0] - 1) < 0.5
