from __future__ import annotations

import numpy as np
import pytest

from halfbyte import kernels
from halfbyte.errors import FormatError
from halfbyte.search.hessian import checked, damped, diagonal_blocks, factor
from search.hessians import hessian


def test_factors_turn_the_hessian_into_a_diagonal() -> None:
    h = damped(checked(hessian(96), 96), 0.01)
    found = factor(h, 0.0)
    product = found.feedback @ h @ found.feedback.T
    mean = np.trace(h) / 96
    assert np.allclose(product, np.diag(found.gain) * mean, atol=1e-9)
    assert np.array_equal(np.diag(found.feedback), np.ones(96)) and not np.tril(found.feedback, -1).any()
    assert np.allclose(found.feedback @ found.unfold, np.eye(96), atol=1e-9)


def test_feedback_is_that_of_the_cholesky_factor_of_the_inverse() -> None:
    """The form in which arXiv 2210.17323 writes it."""
    h = damped(checked(hessian(64), 64), 0.01)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    assert np.allclose(factor(h, 0.0).feedback, upper / np.diag(upper)[:, None], atol=1e-9)


@pytest.mark.parametrize("size", [8, 16, 40, 96, 257])
def test_every_backend_gives_the_bits_of_the_reference(size: int) -> None:
    h = checked(hessian(size), size)
    found = []
    for backend in kernels.backends():
        with kernels.use_backend(backend):
            found.append(factor(np.stack([h, 2 * h + np.eye(size)]), 0.01))
    for other in found[1:]:
        for name in ("feedback", "unfold", "gain"):
            assert np.array_equal(getattr(other, name), getattr(found[0], name)), name


def test_hessians_of_any_memory_layout_are_factored_alike() -> None:
    h = hessian(48)
    expected = factor(checked(h, 48), 0.01).feedback
    for other in (np.asfortranarray(h), h[::-1, ::-1].copy()[::-1, ::-1], np.repeat(h, 2, axis=1)[:, ::2]):
        assert np.array_equal(factor(checked(other, 48), 0.01).feedback, expected)


def test_damping_is_relative_to_the_mean_of_the_diagonal() -> None:
    h = np.diag([1.0, 3.0])
    assert np.allclose(damped(1000 * h, 0.01), np.diag([0.51, 1.51]))


def test_a_hessian_of_fewer_tokens_than_columns_is_factored() -> None:
    found = factor(checked(hessian(128, count=20), 128), 0.01)
    assert found.damping == 0.01 and np.isfinite(found.feedback).all() and (found.gain > 0).all()


def test_damping_grows_where_rounding_made_the_hessian_indefinite() -> None:
    h = checked(hessian(64, count=16), 64)
    shaken = h + np.diag(np.linspace(-1, 1, 64)) * 1e-3 * np.trace(h) / 64
    found = factor(shaken, 1e-5)
    assert found.damping > 1e-5 and np.isfinite(found.feedback).all()


def test_columns_that_no_input_reached_neither_give_nor_take_errors() -> None:
    h = hessian(48)
    h[[3, 40]] = h[:, [3, 40]] = 0
    for damping in (0.0, 0.01):
        found = factor(checked(h, 48), damping)
        off = found.feedback - np.eye(48)
        assert not off[[3, 40]].any() and not off[:, [3, 40]].any()


def test_a_hessian_of_zeros_is_that_of_plain_squared_error() -> None:
    found = factor(checked(np.zeros((32, 32)), 32), 0.01)
    assert np.array_equal(found.feedback, np.eye(32)) and len(set(found.gain)) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda h: h[:-1], "but 32 columns need"),
        (lambda h: h * np.where(np.eye(32) > 0, np.nan, 1), "NaN or infinity"),
        (lambda h: h * np.where(np.arange(32) == 5, np.inf, 1), "NaN or infinity"),
        (lambda h: -h, "negative diagonal"),
        (lambda h: np.triu(h), "not symmetric"),
    ],
)
def test_what_is_no_hessian_is_refused(spoil, message: str) -> None:
    with pytest.raises(FormatError, match=message), np.errstate(invalid="ignore"):
        checked(spoil(hessian(32)), 32)


@pytest.mark.parametrize("backend", kernels.backends())
def test_a_matrix_that_no_damping_makes_definite_is_refused(backend: str) -> None:
    with (
        kernels.use_backend(backend),
        pytest.raises(FormatError, match=r"not positive definite with a damping of 0\.001"),
    ):
        factor(np.kron(np.eye(4), [[1.0, 5.0], [5.0, 1.0]]), 0.001)


@pytest.mark.parametrize("damping", [-0.1, 1.0, float("nan")])
def test_a_damping_outside_its_range_is_refused(damping: float) -> None:
    with pytest.raises(FormatError, match="damping is"):
        factor(np.eye(4), damping)


def test_blocks_along_the_diagonal_are_cut_out() -> None:
    m = np.arange(36.0).reshape(6, 6)
    assert np.array_equal(diagonal_blocks(m, 3), [m[:3, :3], m[3:, 3:]])
    assert diagonal_blocks(np.stack([m, m]), 2).shape == (2, 3, 2, 2)
