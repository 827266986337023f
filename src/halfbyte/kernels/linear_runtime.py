"""What every product needs: the library and its instruction set, threads, and the structure of a call."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte import kernels
from halfbyte.errors import FormatError, HalfbyteError
from halfbyte.formats import Format
from halfbyte.kernels.linear_layout import NativeProduct, describe_weight
from halfbyte.kernels.linear_native import BFLOAT16, ISAS, MODES, TYPES, LinearNative, load

_ALLOWED = {
    "avx512": tuple(ISAS),
    "avx2": ("avxvnni", "avx2"),
    "baseline": ("dotprod", "baseline"),
    "reference": (),
}
_forced: str | None = None
_log = logging.getLogger("halfbyte")


class NoKernelError(HalfbyteError):
    """There is no compiled product for a weight: its format, its shape or this installation has none.

    Callers decode the weight instead.
    """


def isas() -> tuple[str, ...]:
    """What this machine can run, the fastest first; empty without compiled kernels."""
    native = load()
    return native.isas if native else ()


def isa() -> str | None:
    """The instruction set that runs: the fastest that ``kernels.backend()`` allows, or what ``use_isa`` names."""
    if _forced is not None:
        return _forced
    allowed = _ALLOWED.get(kernels.backend(), ())
    return next((name for name in isas() if name in allowed), None)


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Use one of ``isas()`` within a ``with`` statement, in all threads (tests and benchmarks do)."""
    global _forced
    if name not in isas():
        raise ValueError(f"the instruction set {name!r} cannot run here; there are {', '.join(isas())}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def set_threads(count: int) -> None:
    """Let each call use so many threads of the library's own, the calling one among them (1 at first)."""
    if count < 1:
        raise ValueError(f"{count} threads cannot do anything; ask for 1 or more")
    native = load()
    if native:
        native.set_threads(count)


def threads() -> int:
    """Threads that a call may use."""
    native = load()
    return native.threads if native else 1


def has_kernel(fmt: Format) -> bool:
    """Whether there is a compiled product for weights of a format here."""
    return isa() is not None and describe_weight(fmt) is not None


def native_library() -> tuple[LinearNative, str]:
    """The library and the instruction set that runs; NoKernelError where there is none."""
    native, name = load(), isa()
    if native is None or name is None:
        raise NoKernelError("there are no compiled kernels here, so weights must be decoded to be multiplied")
    if name == "baseline" and _forced is None:
        _say_slow()
    return native, name


@cache
def _say_slow() -> None:
    _log.warning(
        "products with quantized weights run without AVX2 (on ARM: without the dot products of ARMv8.2) on this "
        "processor, several times slower"
    )


def product_of(
    x: int, x_type: str, rows: int, y: int, y_type: str, k: int, n: int, mode: str = "exact"
) -> NativeProduct:
    """A product on contiguous memory: addresses and types ("float32", "float16", "bfloat16") of x [rows, k], y."""
    return NativeProduct(x, TYPES[x_type], rows, k, y, TYPES[y_type], n, MODES[mode])


def product_on_arrays(
    x: NDArray[Any], k: int, n: int, mode: str, dtype: Any
) -> tuple[NativeProduct, NDArray[Any], Any]:
    """The structure of a call, its result, and an array that must live until the call is over."""
    if mode not in MODES:
        raise FormatError(f"unknown mode {mode!r}; there are {', '.join(MODES)}")
    if x.dtype == np.uint16:
        x = x.view(BFLOAT16)
    if x.dtype.name not in TYPES or np.dtype(dtype).name not in TYPES:
        raise FormatError(f"activations and results are FP32, FP16 or BF16, not {x.dtype} and {np.dtype(dtype)}")
    if x.ndim == 0 or x.shape[-1] != k:
        raise FormatError(f"activations of shape {list(x.shape)} do not fit a weight with {k} columns")
    x = np.require(x, requirements=("C", "A"))
    y = np.empty((*x.shape[:-1], n), dtype=dtype)
    rows = x.size // k
    kept = x
    if rows == 0:
        kept = np.zeros((1, k), dtype=x.dtype)
    product = product_of(kept.ctypes.data, x.dtype.name, rows, y.ctypes.data, y.dtype.name, k, n, mode)
    return product, y, kept
