"""The compiled kernels, called through ctypes, which lets other Python threads run meanwhile."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.kernels.codec import NativeCodec, NativeDescent, NativeGptq, NativeRows, NativeStats, NativeTask

_INTERFACE = 3
_ISAS = {"avx512": 2, "avx2": 1, "baseline": 0}
_TYPES = {"bfloat16": 0, "float16": 1, "float32": 2}
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
LIBRARY = f"halfbyte_kernels{_SUFFIX}"


class Native:
    """A loaded library; ``isas`` are the instruction sets that this machine can run, the fastest first."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        sizes = sum(ctypes.sizeof(structure) for structure in (NativeCodec, NativeTask, NativeGptq))
        if library.hb_interface() != _INTERFACE * 1000003 + sizes:
            raise OSError(f"{path} belongs to another version of halfbyte")
        for name in ("hb_encode", "hb_decode", "hb_compare", "hb_gptq"):
            getattr(library, name).argtypes = (c_int, c_void_p, c_void_p)
        library.hb_amax.argtypes = (c_int, c_void_p, c_int32, c_int64, c_int64, c_void_p)
        sizes_of_rotation = (c_int64, c_int64, c_int64, c_int, c_float)
        library.hb_rotate.argtypes = (c_int, c_void_p, *sizes_of_rotation, c_void_p, c_int, c_int)
        library.hb_factor.argtypes = (c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p)
        self._library = library
        # libraries that were built before row feedback lack these functions; NumPy does their work then
        self.couples_rows = hasattr(library, "hb_round_rows")
        if self.couples_rows:
            library.hb_round_rows.argtypes = library.hb_descend.argtypes = (c_int, c_void_p, c_void_p)
            library.hb_subtract_products.argtypes = (c_int, *(c_void_p,) * 3, *(c_int64,) * 3)
        self.isas = tuple(name for name, number in _ISAS.items() if library.hb_has_isa(number))

    def amax(self, isa: str, x: NDArray[Any], out: NDArray[np.float32]) -> bool:
        """Largest magnitude of each matrix; False where a NaN or infinity is among them."""
        per_matrix = x.size // max(out.size, 1)
        status = self._library.hb_amax(
            _ISAS[isa], x.ctypes.data, _TYPES[x.dtype.name], out.size, per_matrix, out.ctypes.data
        )
        return bool(status == 0)

    def call(
        self,
        name: str,
        isa: str,
        codec: NativeCodec,
        x: NDArray[Any],
        arrays: dict[str, NDArray[Any] | None],
        stats: NativeStats | None = None,
    ) -> bool:
        """Run hb_encode, hb_decode or hb_compare on x [L, N, K] and the arrays of a task; False for status 1."""
        lead, n, k = x.shape
        task = NativeTask(type=_TYPES[x.dtype.name], lead=lead, n=n, k=k, x=x.ctypes.data)
        for field, array in arrays.items():
            if array is not None:
                assert array.flags.c_contiguous
                setattr(task, field, array.ctypes.data)
        weights = arrays.get("weights")
        task.weight_lead = 0 if weights is None else len(weights)
        if stats is not None:
            task.stats = ctypes.addressof(stats)
        status = getattr(self._library, f"hb_{name}")(_ISAS[isa], ctypes.byref(codec), ctypes.byref(task))
        if status > 1:
            raise RuntimeError(f"the native kernel hb_{name} refused its arguments (status {status})")
        return bool(status == 0)

    def rotate(
        self, isa: str, x: NDArray[np.float32], size: int, norm: float, swaps: NDArray[np.uint8] | None, inverse: bool
    ) -> None:
        """Run hb_rotate on x [L, N, K], in place."""
        assert x.flags.c_contiguous and (swaps is None or swaps.flags.c_contiguous)
        given = (None, 0) if swaps is None else (swaps.ctypes.data, swaps.shape[-1])
        status = self._library.hb_rotate(_ISAS[isa], x.ctypes.data, *x.shape, size, norm, *given, inverse)
        if status:
            raise RuntimeError(f"the native kernel hb_rotate refused its arguments (status {status})")

    def factor(
        self, isa: str, matrices: NDArray[np.float64], inverse: NDArray[np.float64], gain: NDArray[np.float64]
    ) -> bool:
        """Run hb_factor on matrices [L, K, K], in place; False where one is not positive definite."""
        count, k, _ = matrices.shape
        assert all(a.flags.c_contiguous for a in (matrices, inverse, gain))
        pointers = (matrices.ctypes.data, inverse.ctypes.data, gain.ctypes.data)
        return bool(self._library.hb_factor(_ISAS[isa], count, k, *pointers) == 0)

    def gptq(
        self,
        isa: str,
        codec: NativeCodec,
        x: NDArray[Any],
        judge_feedback: bool,
        arrays: dict[str, NDArray[Any] | None],
    ) -> None:
        """Run hb_gptq on x [L, N, K] and the arrays of a task; MemoryError where there is no room."""
        lead, n, k = x.shape
        task = NativeGptq(type=_TYPES[x.dtype.name], lead=lead, n=n, k=k, x=x.ctypes.data)
        task.judge_feedback = judge_feedback
        for field, array in arrays.items():
            if array is not None:
                assert array.flags.c_contiguous
                setattr(task, field, array.ctypes.data)
        status = self._library.hb_gptq(_ISAS[isa], ctypes.byref(codec), ctypes.byref(task))
        if status == 3:
            raise MemoryError(f"no memory to round rows of {k} columns")
        if status:
            raise RuntimeError(f"the native kernel hb_gptq refused its arguments (status {status})")

    def group(
        self, name: str, isa: str, codec: NativeCodec, arrays: dict[str, NDArray[Any] | None], **facts: Any
    ) -> None:
        """Run hb_round_rows or hb_descend on the arrays of a task; MemoryError where there is no room."""
        task = (NativeRows if name == "round_rows" else NativeDescent)(**facts)
        for field, array in arrays.items():
            if array is not None:
                assert array.flags.c_contiguous
                setattr(task, field, array.ctypes.data)
        status = getattr(self._library, f"hb_{name}")(_ISAS[isa], ctypes.byref(codec), ctypes.byref(task))
        if status == 3:
            raise MemoryError(f"no memory to round {facts['n']} rows of {facts['k']} columns")
        if status:
            raise RuntimeError(f"the native kernel hb_{name} refused its arguments (status {status})")

    def subtract_products(
        self, isa: str, out: NDArray[np.float32], left: NDArray[np.float32], right: NDArray[np.float32]
    ) -> None:
        """Run hb_subtract_products on out [M, K], left [S, M] and right [S, K]."""
        assert all(array.flags.c_contiguous for array in (out, left, right))
        pointers = (array.ctypes.data for array in (out, left, right))
        self._library.hb_subtract_products(_ISAS[isa], *pointers, len(left), *out.shape)


def find(folders: Iterable[str]) -> Path | None:
    """The library beside this package, or the one that HALFBYTE_LIBRARY names."""
    given = os.environ.get("HALFBYTE_LIBRARY")
    if given:
        return Path(given)
    return next((p for folder in folders if (p := Path(folder) / LIBRARY).is_file()), None)
