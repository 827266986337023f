from __future__ import annotations

import math

import numpy as np
import pytest

from halfbyte.formats import BlockFormat, get_format
from halfbyte.search import encode, get_search, global_scale


def block(amax: float) -> np.ndarray:
    x = np.zeros((1, 32), dtype=np.float32)
    x[0, 9] = -amax
    return x


SIZES = [1.0, 1.49, 1.5, 1.5000001, 1.74, 1.75, 1.9375, 1.94, 1.99, 2.0, 3.0, 6.0, 7.0, 7.5, 100.0, 448.0, 0.3, 1e-3]
# largest value of the elements, floor of its log2, amax (in [1, 2) times a power of two) that ``even`` rounds up
GRIDS = {"mxfp4": (6.0, 2, 1.75), "mxfp8": (448.0, 8, 1.9375)}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("amax", SIZES)
def test_absmax_of_powers_of_two_is_the_floor_rule(name: str, amax: float) -> None:
    code = int(encode(block(amax), name, "absmax").scales[0, 0])
    assert code - 127 == math.floor(math.log2(np.float32(amax))) - GRIDS[name][1]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("amax", SIZES)
def test_rceil_is_the_smallest_scale_that_does_not_clip(name: str, amax: float) -> None:
    scale = 2.0 ** (int(encode(block(amax), name, "mx_rceil").scales[0, 0]) - 127)
    top = GRIDS[name][0]
    assert np.float32(amax) <= top * scale < 2 * np.float32(amax)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("amax", SIZES)
def test_even_rounds_up_where_rounding_would_leave_the_octave(name: str, amax: float) -> None:
    code = int(encode(block(amax), name, "mx_even").scales[0, 0])
    mantissa, exponent = math.frexp(float(np.float32(amax)))
    expected = exponent - 1 - GRIDS[name][1] + (mantissa * 2 >= GRIDS[name][2])
    assert code - 127 == expected


@pytest.mark.parametrize(
    ("name", "search", "maximum"),
    [
        ("nvfp4", "absmax", 2688),
        ("nvfp4", "sweep", 2688),
        ("nvfp4", "four_over_six", 1536),
        ("mixfp4", "absmax", 2688),
        ("mixfp4", "four_over_six", 1536),
        ("if4", "absmax", 2688),
        ("razer", "absmax", 2688),
        ("razer_e3m3", "absmax", 6 * 28),
        ("iq4_nl", "absmax", 127 * 448),
        ("nf4", "absmax", 448),
    ],
)
def test_the_tensor_scale_maps_amax_to_the_largest_product(name: str, search: str, maximum: int) -> None:
    fmt = get_format(name)
    assert isinstance(fmt, BlockFormat)
    found = global_scale(np.array([1.0, 3.7, 0.0]), fmt, get_search(search))
    assert found.tolist() == [np.float32(1) / np.float32(maximum), np.float32(3.7) / np.float32(maximum), 1.0]


@pytest.mark.parametrize("amax", [1.0, 2688.0, 2689.0, 5376.0, 1e-3])
def test_a_power_of_two_above_leaves_exact_powers_alone(amax: float) -> None:
    fmt = get_format("nvfp4")
    assert isinstance(fmt, BlockFormat)
    found = float(global_scale(np.array(amax), fmt, get_search("absmax"), power_of_two=True))
    assert found / 2 < amax / 2688 <= found
    assert math.frexp(found)[0] == 0.5
