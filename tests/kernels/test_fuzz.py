from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from formats.cases import FORMATS, draw
from halfbyte import kernels
from halfbyte.errors import FormatError
from halfbyte.formats import QuantizedTensor, get_format
from halfbyte.kernels import ErrorStats
from halfbyte.search import encode, get_search
from kernels.cases import NATIVE, QUICK_KERNEL_CASES, TYPES, WITH_KERNELS, differences, reference, width

GUARD = 0xA5


def guarded(shape: tuple[int, ...], dtype: np.dtype, offset: int) -> tuple[NDArray, list[NDArray]]:
    """An array at any byte address, and the bytes on both sides of it."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.full(count + 256, GUARD, dtype=np.uint8)
    start = 64 + offset
    array = memory[start : start + count].view(dtype).reshape(shape)
    return array, [memory[:start], memory[start + count :]]


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE, reason="no native kernels here")
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_kernels_write_their_arrays_and_nothing_beside_them(data: st.DataObject) -> None:
    name, search = data.draw(st.sampled_from([case for case in QUICK_KERNEL_CASES if case[0] != "fp8_tensor"]))
    fmt = get_format(name)
    lead, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    shape = (lead, n, width(fmt, data.draw(st.integers(1, 5))))
    dtype = np.dtype(TYPES[data.draw(st.sampled_from(sorted(TYPES)))])
    x, _ = guarded(shape, dtype, data.draw(st.integers(0, 40)))
    x[...] = draw("normal", shape, data.draw(st.integers(0, 99)))
    arrays, around = {}, []
    for part, (part_type, size) in fmt.parts(shape).items():
        arrays[part], sides = guarded(size, np.dtype(part_type), data.draw(st.integers(0, 40)))
        if part == "global_scale":
            arrays[part][...] = 0.001
        around += sides
    rows = data.draw(st.sampled_from([0, 1, lead]))
    weights = np.ones((rows, shape[2]), np.float32) if rows else None
    isa = data.draw(st.sampled_from(NATIVE))
    with kernels.use_backend(isa):
        stats = ErrorStats()
        assert kernels.encode_into(QuantizedTensor(fmt, shape, **arrays), x, get_search(search, fmt), weights, stats)
    expected = reference(np.array(x), fmt, search, *([] if weights is None else [weights[0]]), **_same(arrays))
    for part, array in arrays.items():
        assert array.tobytes() == getattr(expected, part).tobytes(), part
    assert all((side == GUARD).all() for side in around)


def _same(arrays: dict[str, NDArray]) -> dict[str, NDArray]:
    return {"global_scale": np.array(arrays["global_scale"])} if "global_scale" in arrays else {}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.sampled_from(["transposed", "reversed", "every second", "columns"]))
def test_views_with_any_strides_are_encoded_as_their_copies(name: str, view: str) -> None:
    fmt = get_format(name)
    k = width(fmt, 2)
    x = {
        "transposed": lambda: draw("normal", (k, 6), 1).T,
        "reversed": lambda: draw("normal", (6, k), 2)[::-1],
        "every second": lambda: draw("normal", (12, k), 3)[::2],
        "columns": lambda: draw("normal", (6, k + 5), 4)[:, 3 : 3 + k],
    }[view]()
    assert not differences(encode(x, fmt, "absmax"), encode(np.array(x), fmt, "absmax"))


@pytest.mark.skipif(not NATIVE, reason="no native kernels here")
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_non_finite_weight_anywhere_is_refused_with_its_index(data: st.DataObject) -> None:
    fmt = get_format(data.draw(st.sampled_from(WITH_KERNELS)))
    shape = (2, data.draw(st.integers(1, 4)), width(fmt, data.draw(st.integers(1, 4))))
    dtype = TYPES[data.draw(st.sampled_from(sorted(TYPES)))]
    x = draw("normal", shape, 1).astype(dtype)
    where = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    x[where] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    given_scale = {"global_scale": 0.01} if "global_scale" in fmt.parts(shape) and data.draw(st.booleans()) else {}
    with (
        kernels.use_backend(data.draw(st.sampled_from(NATIVE))),
        pytest.raises(FormatError, match=rf"first at index \[{', '.join(map(str, where))}\]"),
    ):
        encode(x, fmt, data.draw(st.sampled_from(["absmax", "sweep"])), **given_scale)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(1, 3), st.sampled_from(sorted(TYPES)), st.integers(0, 31))
def test_the_largest_magnitude_is_found_wherever_it_is(length: int, lead: int, dtype: str, offset: int) -> None:
    memory = draw("normal", (lead * length + offset,), length).astype(TYPES[dtype])
    x = memory[offset:].reshape(lead, 1, length)
    expected = np.abs(x.astype(np.float32)).max(axis=(1, 2), initial=0)
    for isa in NATIVE:
        with kernels.use_backend(isa):
            found, finite = kernels.amax(x)
        assert finite and found.tobytes() == expected.tobytes()


def test_a_type_without_kernels_takes_the_reference() -> None:
    found, finite = kernels.amax(np.array([[1.0, -3.0]], dtype=np.float64))
    assert (float(found), finite) == (3.0, True)
    assert kernels.amax(np.array([[np.nan]], dtype=ml_dtypes.bfloat16))[1] is False
