"""What a block costs, in the order of operations that all backends share."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.formats.losses import Metric, loss_of, unit_of


@pytest.mark.parametrize(("metric", "loss"), [("sse", [14, 25]), ("mae", [6, 7]), ("max", [3, 4])])
def test_a_block_costs_squares_magnitudes_or_the_largest_of_them(metric: Metric, loss: list[float]) -> None:
    error = np.array([[1, -2, 3], [0, 3, -4]], np.float32)
    assert loss_of(error, None, metric).tolist() == loss


@pytest.mark.parametrize(("metric", "loss"), [("sse", 1 * 2 + 4 * 0.5), ("mae", 1 * 2 + 2 * 0.5), ("max", 2)])
def test_weights_multiply_what_each_element_costs(metric: Metric, loss: float) -> None:
    error, weight = np.array([[1, -2]], np.float32), np.array([[2, 0.5]], np.float32)
    assert loss_of(error, weight, metric).tolist() == [loss]


@pytest.mark.parametrize("columns", [128, 129, 1000])
def test_blocks_of_more_than_128_elements_are_summed_in_64_lanes(columns: int) -> None:
    # one large term, then terms that FP32 loses one by one but keeps as sums of their lanes
    error = np.full((1, columns), 2.0**-12, np.float32)
    error[0, 0] = 1
    in_order = np.float32(1)
    for _ in range(columns - 1):
        in_order += np.float32(2.0**-24)
    assert in_order == 1
    exact = 1 + (columns - 1) * 2.0**-24
    found = float(loss_of(error, None, "sse")[0])
    assert found == 1 if columns == 128 else abs(found - exact) < exact - 1


def test_the_unit_brings_every_scale_between_a_half_and_one() -> None:
    scale = np.array([1, 0.75, 0.5, 3, 2.0**-100, 1e30], np.float32)
    product = unit_of(scale) * scale
    assert ((product >= 0.5) & (product < 1)).all()
    assert (np.frexp(unit_of(scale))[0] == 0.5).all()
