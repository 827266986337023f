"""Weights encoded by the kernel for devices, in Triton's interpreter, against the CPU: the same bytes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from halfbyte.errors import FormatError
from halfbyte.formats import get_format
from halfbyte.gpu.device_encode import encode_on_device, encodes
from halfbyte.kernels import ErrorStats
from halfbyte.search import encode, get_search

FORMATS = [
    "nvfp4",
    "nvfp4_unscaled",
    "nvint4",
    "mixfp4",
    "mixfp4_paper",
    "mixfp4_makora",
    "mixfp4_twos_complement",
    "if4",
]
CASES = [(f, s) for f in FORMATS for s in ("absmax", "sweep", "four_over_six")]
CASES = [(f, s) for f, s in CASES if not get_search(s).problem(get_format(f))]


def values(shape: tuple[int, ...], dtype: Any = ml_dtypes.bfloat16) -> Any:
    """Normal values with blocks of zeros, outliers, minus zeros and tiny ones."""
    x = np.random.default_rng(3).standard_t(3, shape).astype(np.float32)
    x[..., 0, :16], x[..., 1, :32], x[..., 2, 5] = 0, -0.0, 300
    x[..., 3, 16:32] *= 1e-6
    return x.astype(dtype)


def same(first: Any, second: Any) -> None:
    assert first.codes.tobytes() == second.codes.tobytes() and first.scales.tobytes() == second.scales.tobytes()
    assert (first.global_scale is None) == (second.global_scale is None)
    assert first.global_scale is None or first.global_scale.tobytes() == second.global_scale.tobytes()


@pytest.mark.parametrize(("fmt", "search"), CASES)
def test_the_bytes_are_those_of_the_cpu(fmt: str, search: str) -> None:
    x = values((24, 96))
    same(encode_on_device(x, fmt, search, device="cpu"), encode(x, fmt, search))


@pytest.mark.parametrize("search", ["four_over_six_mae", "four_over_six_absmax"])
def test_other_measures_of_error(search: str) -> None:
    x = values((8, 64), np.float32)
    same(encode_on_device(x, "mixfp4", search, device="cpu"), encode(x, "mixfp4", search))


@pytest.mark.parametrize("search", ["sweep", "four_over_six"])
@pytest.mark.parametrize("shared", [True, False])
def test_importance_and_experts_with_global_scales_of_their_own(search: str, shared: bool) -> None:
    x = values((3, 8, 48), np.float16) * np.array([1, 0.01, 30], dtype=np.float16)[:, None, None]
    importance = np.random.default_rng(1).random(48 if shared else (3, 48)).astype(np.float32)
    first = encode_on_device(x, "mixfp4", search, device="cpu", importance=importance)
    same(first, encode(x, "mixfp4", search, importance))


def test_a_given_global_scale_and_the_count_of_errors() -> None:
    x, here, there = values((8, 64)), ErrorStats(), ErrorStats()
    first = encode_on_device(x, "nvfp4", "sweep", device="cpu", global_scale=np.float32(0.01), stats=here)
    same(first, encode(x, "nvfp4", "sweep", global_scale=np.float32(0.01), stats=there))
    assert here.squared_error == pytest.approx(there.squared_error) and here.elements == there.elements


def test_what_has_no_kernel_is_refused() -> None:
    assert not encodes(get_format("mxfp4"), get_search("absmax")) and not encodes(
        get_format("razer"), get_search("sweep")
    )
    assert not encodes(get_format("nvfp4"), get_search("exhaustive"))
    with pytest.raises(FormatError, match="mxfp4 by sweep is not encoded on devices"):
        encode_on_device(values((8, 64)), "mxfp4", "sweep", device="cpu")
    with pytest.raises(FormatError, match="NaN or infinity"):
        encode_on_device(np.full((8, 64), np.nan, np.float32), "nvfp4", "sweep", device="cpu")
