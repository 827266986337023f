from __future__ import annotations

import numpy as np
import pytest
from tests.search.objective import weighted_error

from halfbyte.errors import FormatError
from halfbyte.search.output_metric import prepare_output
from search.hessians import hessian, weight


@pytest.mark.parametrize("rows", [48, 21])
def test_row_feedback_turns_the_weighted_error_into_a_sum_over_rows(rows: int) -> None:
    output = prepare_output(hessian(rows, seed=5), refine=True)
    assert output.metric is not None
    feedback, metric = output.feedback.astype(np.float64), output.metric.astype(np.float64)
    gain = feedback @ metric @ feedback.T
    left, h = weight(rows, 64).astype(np.float64), hessian(64)
    error = feedback.T @ left
    by_rows = np.einsum("ik,kl,il->i", left, h, left) @ np.diagonal(gain)
    assert np.isclose(by_rows, weighted_error(error, h, metric), rtol=1e-5)
    assert np.allclose(np.triu(feedback), feedback) and np.allclose(np.diagonal(feedback), 1)


def test_rows_with_the_largest_gradients_come_first() -> None:
    h = hessian(40)
    assert (np.diff(np.diagonal(h)[prepare_output(h).rows]) <= 0).all()


def test_outputs_without_gradients_weigh_all_rows_alike() -> None:
    output = prepare_output(np.zeros((9, 9)), refine=True)
    assert np.array_equal(output.feedback, np.eye(9)) and np.array_equal(output.metric, np.eye(9))


def test_a_matrix_that_is_no_sum_of_squares_is_refused() -> None:
    for wrong in (-np.eye(8), np.full((8, 8), np.nan), np.arange(64.0).reshape(8, 8), np.ones((8, 4))):
        with pytest.raises(FormatError):
            prepare_output(wrong)
