from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from halfbyte.checkpoint.dtypes import BITS, itemsize, nbytes, numpy_dtype, safetensors_name
from halfbyte.errors import CheckpointError

READABLE = [name for name, bits in BITS.items() if bits >= 8]


@pytest.mark.parametrize("name", READABLE)
def test_every_readable_dtype_round_trips_through_numpy(name: str) -> None:
    assert safetensors_name(numpy_dtype(name)) == name
    assert itemsize(name) * 8 == BITS[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BF16", ml_dtypes.bfloat16),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
        ("F8_E8M0", ml_dtypes.float8_e8m0fnu),
        ("BOOL", np.bool_),
    ],
)
def test_names_mean_the_types_of_the_format(name: str, expected: type) -> None:
    assert numpy_dtype(name) == np.dtype(expected)


def test_packed_dtypes_have_a_size_but_no_numpy_type() -> None:
    assert nbytes("F4", [3, 6]) == 9
    assert nbytes("F6_E2M3", [4]) == 3
    with pytest.raises(CheckpointError, match="packs several numbers"):
        numpy_dtype("F4")


def test_packed_tensors_must_fill_whole_bytes() -> None:
    with pytest.raises(CheckpointError, match="whole bytes"):
        nbytes("F4", [3])


def test_scalars_and_empty_tensors_have_their_size() -> None:
    assert nbytes("F32", []) == 4
    assert nbytes("F32", [0, 7]) == 0


@pytest.mark.parametrize("lookup", [numpy_dtype, itemsize])
def test_an_unknown_dtype_is_named(lookup) -> None:
    with pytest.raises(CheckpointError, match="'F3'"):
        lookup("F3")


@pytest.mark.parametrize("dtype", [">f4", "S4", "O", "c16"])
def test_numpy_types_without_a_spelling_are_refused(dtype: str) -> None:
    with pytest.raises(CheckpointError, match="no spelling"):
        safetensors_name(np.dtype(dtype))
