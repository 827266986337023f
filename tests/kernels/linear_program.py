"""Cases for ``linear_program.cpp``: packed weights and activations as bytes, and the results to expect."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.kernels.linear import PackedWeight
from halfbyte.kernels.linear_native import TYPES
from kernels.linear_cases import (
    FP32_ONLY,
    PRODUCT_FORMATS,
    activations,
    columns,
    expected,
    rounded_to_int8,
    weight,
)


@dataclass
class Case:
    """One product; ``tolerance`` is relative to the norm of the result."""

    name: str
    data: bytes
    expected: NDArray[np.float64]
    tolerance: float


def _sized(array: NDArray[Any] | None) -> bytes:
    data = b"" if array is None else array.tobytes()
    return struct.pack("<q", len(data)) + data


def cases() -> list[Case]:
    """Every format in both modes, a few and many rows, FP32 and FP16 activations."""
    made = []
    for name in PRODUCT_FORMATS:
        tensor = weight(name, (21, columns(name, 3)))
        packed = PackedWeight(tensor)
        arrays = (packed._codes, packed._scales, packed._offsets, packed._global, packed._swaps)
        start = bytes(packed.native) + b"".join(_sized(a) for a in arrays)
        plain = weight(name, tensor.shape)
        if name in ("mxfp4_hadamard", "mxfp4_duquant"):
            plain.format = plain.format.plain
        for rows in (3, 9):
            x = activations(rows, tensor.shape[1], dtype=np.float16 if rows == 9 else np.float32)
            turned = x.astype(np.float32)
            if plain.format is not tensor.format:
                tensor.format.rotate_in_place(turned, tensor.rotation)
            for mode in (0, 1):
                integers = mode == 1 and name not in FP32_ONLY
                wanted = expected(rounded_to_int8(turned), plain) if integers else expected(x, tensor)
                call = struct.pack("<qqq", rows, TYPES[x.dtype.name], mode) + _sized(x)
                made.append(Case(f"{name}, mode {mode}, {rows} rows", start + call, wanted, 2e-6))
    return made
