"""Scale types: how a block's scale is stored, in how many bits, and which codes neighbour it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from halfbyte.formats.arrays import Floats


@dataclass(frozen=True)
class ScaleType:
    """A storage type for positive scales.

    ``to_code`` rounds positive FP32 values to codes (never to zero), ``to_value`` gives the FP32 value of
    codes. ``bits`` are the bits of the code itself; selector bits lie above them in the same byte.
    Ordered types (``low``..``high``) have codes that grow with the value, so that a search can step through
    them; for the others (BF16, FP16, FP32) a search multiplies the base scale by ratios.
    """

    name: str
    dtype: Any
    bits: int
    maximum: float
    to_code: Callable[[Floats], NDArray[Any]]
    to_value: Callable[[NDArray[Any]], Floats]
    low: int = 0
    high: int = -1

    @property
    def ordered(self) -> bool:
        """Whether neighbouring codes can be tried one by one."""
        return self.high >= 0


def _e4m3_code(v: Floats) -> NDArray[np.uint8]:
    rounded = np.minimum(v, np.float32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.maximum(rounded, np.uint8(1))


def _e4m3_value(c: NDArray[Any]) -> Floats:
    return np.asarray(c.view(ml_dtypes.float8_e4m3fn).astype(np.float32))


def _power_value(c: NDArray[Any]) -> Floats:
    powers = np.ldexp(np.float32(1), np.minimum(c, 254).astype(np.int32) - 127).astype(np.float32)
    return np.where(c == 255, np.float32(np.nan), powers)


def _power_code(v: Floats) -> NDArray[np.uint8]:
    # exact powers of two only; the rules that choose them are in search/rules.py
    return np.clip(np.frexp(v)[1] - 1 + 127, 0, 254).astype(np.uint8)


def _small_float_code(v: Floats, mantissa_bits: int, bias: int, low: int, high: int) -> NDArray[np.uint8]:
    """Round half to even to a float with subnormals, by counting its steps exactly."""
    exponent = np.maximum(np.frexp(v)[1] - 1, 1 - bias)
    steps = np.rint(np.ldexp(v, mantissa_bits - exponent)).astype(np.int64)
    code = ((exponent + bias - 1).astype(np.int64) << mantissa_bits) + steps
    return np.clip(code, low, high).astype(np.uint8)


def _small_float_value(c: NDArray[Any], mantissa_bits: int, bias: int) -> Floats:
    code = c.astype(np.int32)
    field = code >> mantissa_bits
    mantissa = (code & ((1 << mantissa_bits) - 1)) + np.where(field > 0, 1 << mantissa_bits, 0)
    return np.ldexp(mantissa.astype(np.float32), np.maximum(field, 1) - bias - mantissa_bits)


def _e3m3_code(v: Floats) -> NDArray[np.uint8]:
    return _small_float_code(np.minimum(v, np.float32(28)), 3, 3, 1, 62)


def _e6m2_code(v: Floats) -> NDArray[np.uint8]:
    # no subnormals: the lowest code is 2**-48
    mantissa, exponent = np.frexp(v)
    code = (exponent.astype(np.int64) - 1 + 48) * 4 + np.rint((mantissa * 2 - 1) * 4).astype(np.int64)
    return np.clip(code, 0, 254).astype(np.uint8)


def _e6m2_value(c: NDArray[Any]) -> Floats:
    code = c.astype(np.int32)
    return np.ldexp((4 + (code & 3)).astype(np.float32), (code >> 2) - 48 - 2)


def _cast(dtype: Any, tiny: float, largest: float) -> Callable[[Floats], NDArray[Any]]:
    return partial(_clipped, dtype=dtype, low=np.float32(tiny), high=np.float32(largest))


def _clipped(v: Floats, dtype: Any, low: np.float32, high: np.float32) -> NDArray[Any]:
    return np.asarray(np.clip(v, low, high).astype(dtype))


def _widen(c: NDArray[Any]) -> Floats:
    return np.asarray(c.astype(np.float32))


E4M3 = ScaleType("e4m3", np.uint8, 7, 448.0, _e4m3_code, _e4m3_value, 1, 126)
"""FP8 scale of NVFP4; bit 7 is free for a selector."""

E8M0 = ScaleType("e8m0", np.uint8, 8, 2.0**127, _power_code, _power_value, 0, 254)
"""Power-of-two scale of the MX formats: 2**(code - 127); 0xFF is NaN."""

E3M3 = ScaleType(
    "e3m3",
    np.uint8,
    6,
    28.0,
    _e3m3_code,
    partial(_small_float_value, mantissa_bits=3, bias=3),
    1,
    62,
)
"""RaZeR's 6-bit weight scale (largest value 28, two bits above it choose the special value)."""

E6M2 = ScaleType("e6m2", np.uint8, 8, 1.5 * 2.0**15, _e6m2_code, _e6m2_value, 0, 254)
"""HiF4's scale: bias 48, 0xFF is NaN."""

BF16 = ScaleType("bf16", ml_dtypes.bfloat16, 16, 3.3e38, _cast(ml_dtypes.bfloat16, 1.2e-38, 3.3e38), _widen)
FP16 = ScaleType("fp16", np.float16, 16, 65504.0, _cast(np.float16, 6e-8, 65504.0), _widen)
FP32 = ScaleType("fp32", np.float32, 32, 3.4e38, _cast(np.float32, 1.2e-38, 3.4e38), _widen)

BY_NAME = {scale.name: scale for scale in (E4M3, E8M0, E3M3, E6M2, BF16, FP16, FP32)}
"""The scale types of this release."""
