"""The compiled products, called through ctypes, which lets other Python threads run meanwhile."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from halfbyte.kernels.linear_layout import NativeDense, NativeMixture, NativeProduct, NativeWeight
from halfbyte.kernels.native import find

_INTERFACE = 1
ISAS = {
    "avx512bf16": 5,
    "avx512vnni": 4,
    "avx512": 3,
    "avxvnni": 2,
    "dotprod": 6,
    "avx2": 1,
    "baseline": 0,
}
"""Instruction sets by name, the fastest first."""
TYPES = {"bfloat16": 0, "float16": 1, "float32": 2}
MODES = {"exact": 0, "int8": 1, "auto": 2}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "clamped_swiglu": 2, "relu2": 3, "identity": 4}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class LinearNative:
    """A loaded library; ``isas`` are the instruction sets that this machine can run, the fastest first."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        structures = (NativeWeight, NativeDense, NativeProduct, NativeMixture)
        sizes = sum(ctypes.sizeof(structure) for structure in structures)
        if library.hb_linear_interface() != _INTERFACE * 1000003 + sizes:
            raise OSError(f"{path} belongs to another version of halfbyte")
        library.hb_packed_bytes.argtypes = (c_void_p, *(POINTER(c_int64),) * 3)
        library.hb_repack.argtypes = library.hb_unpack.argtypes = (c_void_p,) * 4
        library.hb_unpack_rows.argtypes = (c_void_p, c_int64, c_void_p, c_int64, *(c_void_p,) * 3)
        library.hb_linear.argtypes = (c_int, c_void_p, c_int64, c_void_p)
        library.hb_linear_dense.argtypes = (c_int, c_void_p, c_void_p)
        library.hb_experts.argtypes = (c_int, c_void_p, c_void_p)
        library.hb_set_threads.argtypes = (c_int,)
        self._library = library
        self.isas = tuple(name for name, number in ISAS.items() if library.hb_linear_has_isa(number))

    def packed_bytes(self, weight: NativeWeight) -> tuple[int, int, int]:
        """Bytes of the packed codes, scales and offsets of a described weight."""
        sizes = (c_int64(), c_int64(), c_int64())
        self._library.hb_packed_bytes(byref(weight), *(byref(size) for size in sizes))
        return sizes[0].value, sizes[1].value, sizes[2].value

    def repack(self, weight: NativeWeight, *arrays: NDArray[Any] | None) -> None:
        """Fill the packed arrays from codes, scales and offsets as files have them."""
        self._library.hb_repack(byref(weight), *(_address(array) for array in arrays))

    def unpack(self, weight: NativeWeight, *arrays: NDArray[Any] | None) -> None:
        """Fill codes, scales and offsets as files have them from the packed arrays."""
        self._library.hb_unpack(byref(weight), *(_address(array) for array in arrays))

    def unpack_rows(
        self, weight: NativeWeight, lead: int, rows: NDArray[np.int64], *arrays: NDArray[Any] | None
    ) -> None:
        """Fill codes, scales and offsets [len(rows), ...] from these rows of a matrix."""
        given = (_address(array) for array in arrays)
        self._library.hb_unpack_rows(byref(weight), lead, rows.ctypes.data, len(rows), *given)

    def linear(self, isa: str, weight: NativeWeight, lead: int, product: NativeProduct) -> None:
        """Run hb_linear."""
        _check("hb_linear", self._library.hb_linear(ISAS[isa], byref(weight), lead, byref(product)))

    def dense(self, isa: str, weight: NativeDense, product: NativeProduct) -> None:
        """Run hb_linear_dense."""
        _check("hb_linear_dense", self._library.hb_linear_dense(ISAS[isa], byref(weight), byref(product)))

    def experts(self, isa: str, mixture: NativeMixture, product: NativeProduct) -> None:
        """Run hb_experts."""
        _check("hb_experts", self._library.hb_experts(ISAS[isa], byref(mixture), byref(product)))

    def set_threads(self, threads: int) -> None:
        """Let one call use so many threads."""
        self._library.hb_set_threads(threads)

    @property
    def threads(self) -> int:
        """Threads that one call may use."""
        return int(self._library.hb_threads())


def _check(name: str, status: int) -> None:
    if status == 3:
        raise MemoryError(f"no memory for the activations of {name}")
    if status:
        raise RuntimeError(f"the native kernel {name} refused its arguments (status {status})")


def _address(array: NDArray[Any] | None) -> int | None:
    assert array is None or array.flags.c_contiguous
    return None if array is None else array.ctypes.data


def address_of(structure: Structure | None) -> int | None:
    """The address of a structure that the caller keeps alive."""
    return None if structure is None else ctypes.addressof(structure)


def aligned(count: int) -> NDArray[np.uint8]:
    """``count`` bytes that begin at a multiple of 64, as lines of the cache do."""
    memory = np.empty(count + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + count]


@cache
def load() -> LinearNative | None:
    """The library beside this package or the one that HALFBYTE_LIBRARY names; None where there is none that fits."""
    path = find((str(Path(__file__).parent),))
    if path is None:
        return None
    try:
        return LinearNative(path)
    except (OSError, AttributeError):
        return None
