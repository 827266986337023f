from __future__ import annotations

import numpy as np
import pytest

from halfbyte.search.blocks import from_blocks, to_blocks

SHAPE = (2, 6, 24)


@pytest.mark.parametrize("block", [(1, 8), (1, -1), (-1, -1), (4, 16), (6, 24), (128, 128)])
def test_blocks_return_to_the_matrix(block: tuple[int, int]) -> None:
    x = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    assert np.array_equal(from_blocks(to_blocks(x, block), SHAPE, block), x)


def test_tiles_are_rectangles_padded_with_zeros() -> None:
    x = np.arange(1, 13).reshape(1, 3, 4)
    assert to_blocks(x, (2, 3)).tolist() == [
        [[1, 2, 3, 5, 6, 7], [4, 0, 0, 8, 0, 0], [9, 10, 11, 0, 0, 0], [12, 0, 0, 0, 0, 0]]
    ]


def test_a_tile_shares_one_scale_and_padding_does_not_count() -> None:
    from halfbyte.search import encode

    x = np.ones((130, 150), dtype=np.float32)
    x[128:, 128:] = 8
    scales = encode(x, "fp8_block128", "absmax").scales
    assert scales.shape == (2, 2)
    np.testing.assert_allclose(scales, np.array([[1, 1], [1, 8]]) / 448, rtol=1e-6)
