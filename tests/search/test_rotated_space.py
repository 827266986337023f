from __future__ import annotations

import numpy as np
import pytest

from halfbyte.errors import FormatError
from halfbyte.formats import get_format
from halfbyte.formats.rotation import END, hadamard_matrix, rotate_reference
from halfbyte.search import encode
from halfbyte.search.rotated_space import duquant_swaps, rotated_hessian
from search.hessians import inputs, weight


def with_outliers(count: int = 200) -> np.ndarray:
    x = inputs(64, count)
    x[:, 5] *= 40
    x[:, 41] *= 25
    return x


@pytest.mark.parametrize("size", [1, 2, 16, 32, 128])
def test_hadamard_matrices_are_orthogonal_and_flat(size: int) -> None:
    h = hadamard_matrix(size)
    assert np.allclose(h @ h.T, np.eye(size)) and np.allclose(np.abs(h), size**-0.5)


def rotation_matrices(size: int, swaps: np.ndarray) -> np.ndarray:
    """The rotations [blocks, size, size] that steps [blocks, steps] stand for."""
    matrices = np.tile(np.eye(size), (len(swaps), 1, 1))
    rotate_reference(matrices, size, swaps[:, None])
    return matrices


def rotate_columns(x: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Each block of columns times its rotation, or the one for all."""
    blocks = x.reshape(*x.shape[:-1], -1, r.shape[-1])
    return np.matmul(blocks[..., None, :], r)[..., 0, :].reshape(x.shape)


def turning(x: np.ndarray, size: int = 32) -> np.ndarray:
    """The rotations that DuQuant's steps for these inputs amount to."""
    return rotation_matrices(size, duquant_swaps(x.T @ x, size))


@pytest.mark.parametrize("block", [16, 32])
def test_duquant_rotations_are_orthogonal_and_lower_the_largest_value(block: int) -> None:
    x = np.concatenate([with_outliers(), with_outliers()], axis=1)[:, : block * 3]
    r = turning(x, block)
    assert r.shape == (3, block, block) and np.allclose(r @ np.swapaxes(r, 1, 2), np.eye(block), atol=1e-6)
    turned = rotate_columns(x, r).reshape(len(x), 3, block)
    before = np.square(x.reshape(len(x), 3, block)).mean(axis=0).max(axis=1)
    after = np.square(turned).mean(axis=0).max(axis=1)
    assert after[0] < 0.1 * before[0]
    assert after[0] < np.square(rotate_columns(x, hadamard_matrix(block))[:, :block]).mean(axis=0).max()


def test_channels_without_activations_get_the_hadamard_matrix() -> None:
    swaps = duquant_swaps(np.zeros((64, 64)))
    assert (swaps[:, 0] == 0).all() and (swaps[:, 1:] == END).all()
    assert np.allclose(rotation_matrices(32, swaps), hadamard_matrix(32), atol=1e-7)


def test_each_matrix_of_a_stack_has_steps_of_its_own() -> None:
    x = with_outliers()
    other = x[:, ::-1]
    both = duquant_swaps(np.stack([x.T @ x, other.T @ other]))
    assert both.shape == (2, 2, 16) and (both[0] != both[1]).any()
    assert np.array_equal(both[0], duquant_swaps(x.T @ x))


def test_a_layer_computes_the_same_with_both_sides_rotated() -> None:
    w, x = weight(2, 8, 64), with_outliers()
    for r in (hadamard_matrix(32), turning(x)):
        assert np.allclose(
            rotate_columns(x, r) @ np.swapaxes(rotate_columns(w, r), 1, 2), x @ np.swapaxes(w, 1, 2), atol=1e-4
        )
        assert np.allclose(rotate_columns(rotate_columns(w, r), np.swapaxes(r, -1, -2)), w, atol=1e-7)


def test_hessians_are_those_of_rotated_inputs() -> None:
    x, fmt = with_outliers(), get_format("mxfp4_duquant")
    swaps = duquant_swaps(x.T @ x)
    turned = rotate_columns(x, rotation_matrices(32, swaps))
    assert np.allclose(rotated_hessian(x.T @ x, fmt, swaps), turned.T @ turned)


def test_rotated_activations_with_outliers_lose_less_in_mxfp4() -> None:
    x = with_outliers().astype(np.float32)

    def error(a: np.ndarray) -> float:
        return float(np.square(encode(a, "mxfp4", "absmax").decode() - a).sum())

    assert error(rotate_columns(x, turning(x))) < error(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hadamard_matrix(24), "power of two, not blocks of 24"),
        (lambda: duquant_swaps(np.full((32, 32), np.nan)), "NaN or infinity"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        call()
