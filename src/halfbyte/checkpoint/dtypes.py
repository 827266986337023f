"""Element types of safetensors files: their spelling, their bits, and the NumPy type that views them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from halfbyte.errors import CheckpointError

#: Spelling in a safetensors header -> (bits per element, NumPy type). Sub-byte types are packed by their
#: producers, so no NumPy type views them; they can be copied but not read as numbers. Little-endian always.
_TYPES: dict[str, tuple[int, Any]] = {
    "BOOL": (8, np.bool_),
    "U8": (8, np.uint8),
    "I8": (8, np.int8),
    "U16": (16, "<u2"),
    "I16": (16, "<i2"),
    "U32": (32, "<u4"),
    "I32": (32, "<i4"),
    "U64": (64, "<u8"),
    "I64": (64, "<i8"),
    "F16": (16, "<f2"),
    "BF16": (16, ml_dtypes.bfloat16),
    "F32": (32, "<f4"),
    "F64": (64, "<f8"),
    "C64": (64, "<c8"),
    "F8_E4M3": (8, ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": (8, ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": (8, ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": (8, ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": (8, ml_dtypes.float8_e8m0fnu),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}

#: Bits per element by spelling.
BITS: dict[str, int] = {name: bits for name, (bits, _) in _TYPES.items()}
_NUMPY: dict[str, np.dtype[Any]] = {name: np.dtype(t) for name, (_, t) in _TYPES.items() if t is not None}
_NAMES: dict[np.dtype[Any], str] = {dtype: name for name, dtype in _NUMPY.items()}


def _bits(name: str) -> int:
    try:
        return BITS[name]
    except KeyError:
        raise CheckpointError(f"unknown dtype {name!r}; known are {', '.join(BITS)}") from None


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type for a safetensors spelling, e.g. ``"BF16"`` -> ``ml_dtypes.bfloat16``.

    Raises CheckpointError for an unknown spelling and for sub-byte types (F4, F6_*), which are packed.
    """
    _bits(name)
    try:
        return _NUMPY[name]
    except KeyError:
        raise CheckpointError(
            f"dtype {name} packs several numbers into a byte, so it can be copied but not read as numbers"
        ) from None


def safetensors_name(dtype: np.dtype[Any] | type) -> str:
    """The safetensors spelling of a NumPy type; CheckpointError when there is none."""
    try:
        return _NAMES[np.dtype(dtype)]
    except KeyError:
        raise CheckpointError(f"NumPy type {np.dtype(dtype)} has no spelling in safetensors files") from None


def itemsize(name: str) -> int:
    """Bytes per element; CheckpointError for an unknown spelling and for sub-byte types."""
    return numpy_dtype(name).itemsize


def nbytes(name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of this dtype and shape, sub-byte types included; they must fill whole bytes."""
    whole, rest = divmod(math.prod(shape) * _bits(name), 8)
    if rest:
        raise CheckpointError(f"a {name} tensor of shape {list(shape)} does not fill whole bytes")
    return whole
