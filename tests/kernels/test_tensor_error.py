"""The error of a weight over its slices: sums are added, maxima compared."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.formats import QuantizedTensor, get_format
from halfbyte.kernels import ErrorStats, backends, use_backend
from halfbyte.kernels.tensor_error import TensorError


def part(elements: int, squared: float, squares: float, largest: float, saturated: int) -> TensorError:
    return TensorError("w", "role", "mixfp4", elements, squared, squares, largest, [elements, 1], saturated)


def test_merging_adds_sums_and_keeps_the_largest_error() -> None:
    whole = part(16, 1.0, 8.0, 0.5, 3)
    whole.merge(part(32, 2.0, 4.0, 0.25, 4))
    assert whole == TensorError("w", "role", "mixfp4", 48, 3.0, 12.0, 0.5, [48, 2], 7)
    assert whole.relmse == 0.25


def test_counting_slices_adds_sums_and_keeps_the_largest_error() -> None:
    whole = TensorError("w", "role", "mixfp4", 48)
    whole.count(ErrorStats(16, 1.0, 8.0, 0.5, 3, [1, 0]))
    whole.count(ErrorStats(32, 2.0, 4.0, 0.25, 4, [1, 1]))
    assert whole == TensorError("w", "role", "mixfp4", 48, 3.0, 12.0, 0.5, [2, 1], 7)


def test_statistics_add_up() -> None:
    sums = ErrorStats(16, 1.0, 8.0, 0.5, 3, [1])
    sums.add(ErrorStats(32, 2.0, 4.0, 0.75, 4, [1, 1]))
    assert sums == ErrorStats(48, 3.0, 12.0, 0.75, 7, [2, 1])


@pytest.mark.parametrize("backend", backends())
def test_elements_beyond_the_largest_value_of_their_block_are_saturated(backend: str) -> None:
    """Ones in blocks of scale 1, whose values reach from -6 to 6."""
    tensor = QuantizedTensor(
        get_format("mxfp4"), (2, 32), np.full((2, 16), 0x22, np.uint8), np.full((2, 1), 127, np.uint8), None
    )
    source = np.ones((2, 32), np.float32)
    source[0, :4] = [6, -6, 6.5, -7]
    error = TensorError("w", "role", "mxfp4", 64)
    with use_backend(backend):
        error.add(source, tensor)
        error.add(source, tensor)
    assert error.saturated == 2 * 2


def test_a_rounded_global_scale_is_told_from_another_code() -> None:
    tensor = QuantizedTensor(
        get_format("mxfp4"),
        (1024, 1024),
        np.full((1024, 512), 0x22, np.uint8),
        np.full((1024, 32), 127, np.uint8),
        None,
    )
    source = tensor.decode()
    rounded = TensorError("w", "role", "mxfp4", source.size, source="mxfp4")
    rounded.add(np.nextafter(source, np.float32(9)), tensor)
    assert rounded.rounded and not rounded.lossless
    changed = TensorError("w", "role", "mxfp4", source.size, source="mxfp4")
    source[5, 7] = 1.5
    changed.add(source, tensor)
    assert not changed.rounded and not changed.lossless
