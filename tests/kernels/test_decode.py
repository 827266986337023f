from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from halfbyte import kernels
from halfbyte.formats import Format, QuantizedTensor, get_format
from kernels.cases import NATIVE, WITH_KERNELS, width


def random_tensor(fmt: Format, shape: tuple[int, ...], seed: int) -> QuantizedTensor:
    """Any bytes for codes and scales."""
    r = np.random.RandomState(seed)
    arrays = {}
    for name, (dtype, size) in fmt.parts(shape).items():
        count = int(np.prod(size, dtype=np.int64)) * np.dtype(dtype).itemsize
        arrays[name] = np.frombuffer(r.bytes(count), dtype=dtype).reshape(size).copy()
    if "global_scale" in arrays:
        arrays["global_scale"] = np.asarray(r.uniform(0.001, 3, arrays["global_scale"].shape), dtype=np.float32)
    return QuantizedTensor(fmt, shape, **arrays)


@pytest.mark.parametrize("name", WITH_KERNELS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
def test_any_bytes_are_decoded_as_the_reference_decodes_them(name: str, lead: tuple[int, ...]) -> None:
    fmt = get_format(name)
    tensor = random_tensor(fmt, (*lead, 6, width(fmt, 5)), 1)
    with np.errstate(all="ignore"):
        expected = fmt.decode(tensor)
        narrow = expected.astype(ml_dtypes.bfloat16)
        for isa in NATIVE:
            with kernels.use_backend(isa):
                assert np.array_equal(tensor.decode(), expected, equal_nan=True), isa
                found = tensor.decode(ml_dtypes.bfloat16)
                assert np.array_equal(found.astype(np.float32), narrow.astype(np.float32), equal_nan=True), isa


@pytest.mark.parametrize("name", ["nvfp4", "mixfp4"])
def test_a_stored_divisor_is_what_decoding_divides_by(name: str) -> None:
    fmt = get_format(name)
    tensor = random_tensor(fmt, (2, 4, 64), 2)
    tensor.scales &= np.uint8(0xF7)  # no NaN
    tensor.global_scale_inv = np.array([3.0, 7.0], dtype=np.float32)
    expected = fmt.decode(tensor)
    for isa in NATIVE:
        with kernels.use_backend(isa):
            assert tensor.decode().tobytes() == expected.tobytes()


def test_a_single_row_is_decoded() -> None:
    tensor = random_tensor(get_format("int4_g32"), (96,), 3)
    with np.errstate(all="ignore"):
        expected = tensor.format.decode(tensor)
    assert np.array_equal(tensor.decode(), expected, equal_nan=True)


def test_views_are_decoded_as_their_copies() -> None:
    whole = random_tensor(get_format("mxfp8"), (4, 6, 96), 4)
    part = QuantizedTensor(whole.format, (4, 3, 96), whole.codes[:, ::2], whole.scales[:, ::2])
    assert np.array_equal(part.decode(), whole.decode()[:, ::2], equal_nan=True)


def test_arrays_that_do_not_fit_the_shape_are_left_to_the_reference() -> None:
    tensor = random_tensor(get_format("mxfp4"), (4, 64), 5)
    tensor.scales = tensor.scales[:2]
    assert not kernels.decode_into(tensor, np.empty((4, 64), dtype=np.float32))
