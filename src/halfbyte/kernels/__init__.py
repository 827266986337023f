"""Fast paths behind one small interface; each equals the NumPy reference bit for bit.

The kernels work on plain buffers: NumPy arrays, or torch CPU tensors through ``as_array``, without copies. They use
one thread each and release Python's lock, so that callers may run them on slices from as many threads as they like.
Where there is no compiled library (no wheel and no compiler), ``backend()`` is "reference" and NumPy does the work.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import Format, QuantizedTensor
from halfbyte.formats.rotation import norm
from halfbyte.formats.scale_search import ScaleSearch
from halfbyte.kernels.buffers import as_array
from halfbyte.kernels.codec import NativeStats, describe
from halfbyte.kernels.native import Native, find
from halfbyte.kernels.stats import ErrorStats, codebook_count, reference_stats

__all__ = [
    "NUMPY_ONLY",
    "ErrorStats",
    "amax",
    "as_array",
    "backend",
    "backends",
    "compare",
    "decode_into",
    "encode_into",
    "factor_into",
    "gptq_into",
    "rotate_into",
    "supports",
    "supports_gptq",
    "use_backend",
    "use_backend_here",
]

# Formats without kernels, encoded and decoded by NumPy: codes that are neither 4 nor 8 bits wide, scales in FP16.
NUMPY_ONLY = frozenset(
    {f"affine{bits}_g{group}" for bits in (2, 3, 5, 6) for group in (32, 64, 128)} | {"iq4_nl_g32", "q4_0", "q8_0"}
)

_REFERENCE = "reference"
_SOURCES = ("bfloat16", "float16", "float32")
_DECODED = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
_log = logging.getLogger("halfbyte")


def _load() -> Native | None:
    path = find(__path__)
    if path is not None:
        try:
            return Native(path)
        except OSError as error:
            _log.warning("the native kernels cannot be used (%s); NumPy does their work, 10 to 100 times slower", error)
            return None
    _log.warning("halfbyte was installed without its native kernels; NumPy does their work, 10 to 100 times slower")
    return None


def _choose(wanted: str | None) -> str:
    if wanted and wanted in backends():
        return wanted
    if wanted:
        _log.warning("HALFBYTE_ISA=%s cannot run here; there are %s", wanted, ", ".join(backends()))
    return backends()[0]


def backends() -> tuple[str, ...]:
    """What can run here, the fastest first: of "avx512", "avx2", "baseline", and always "reference"."""
    return (*(_native.isas if _native else ()), _REFERENCE)


def backend() -> str:
    """What runs here: the fastest of ``backends()``, or what HALFBYTE_ISA or ``use_backend`` name."""
    return _chosen.get() or _default


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one of ``backends()`` within a ``with`` statement, in this thread (tests and benchmarks do).

    Pools take it over with ``use_backend_here`` as their initializer.
    """
    if name not in backends():
        raise ValueError(f"the backend {name!r} cannot run here; there are {', '.join(backends())}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def use_backend_here(name: str) -> None:
    """Use a backend in this thread from now on: ``ThreadPoolExecutor(..., initializer=use_backend_here, ...)``."""
    _chosen.set(name)


def supports(fmt: Format, search: ScaleSearch | None = None) -> bool:
    """Whether compiled code runs for this format, rotated or not, and this search (None: for decoding)."""
    return backend() != _REFERENCE and describe(fmt.plain, search) is not None


def amax(x: NDArray[Any]) -> tuple[NDArray[np.float32], bool]:
    """Largest magnitude of each matrix of x [..., N, K], shape [...], and whether all elements are finite."""
    lead = x.shape[:-2]
    if backend() == _REFERENCE or _native is None or x.dtype.name not in _SOURCES:
        largest = np.abs(_matrices(x)).max(axis=(1, 2), initial=0).astype(np.float32)
        return largest.reshape(lead), bool(np.isfinite(largest).all())
    out = np.empty(lead, dtype=np.float32)
    finite = _native.amax(backend(), np.ascontiguousarray(x), out)
    return out, finite


def encode_into(
    out: QuantizedTensor,
    x: NDArray[Any],
    search: ScaleSearch,
    weights: NDArray[np.float32] | None = None,
    stats: ErrorStats | None = None,
) -> bool:
    """Encode x [..., N, K] (contiguous BF16, FP16 or FP32) into the contiguous arrays of a tensor of its shape.

    Global scales, and the scale of formats with one per matrix, are in ``out`` already. ``weights`` FP32 [1 or L, K];
    ``stats`` are added to. Only where ``supports`` is true. False where x holds a NaN or an infinity; the arrays are
    worthless then.
    """
    codec = describe(out.format, search)
    assert _native is not None and codec is not None
    arrays: dict[str, NDArray[Any] | None] = {
        name: getattr(out, name) for name in ("codes", "scales", "offsets", "global_scale", "global_scale_inv")
    }
    sums = NativeStats() if stats is not None else None
    finite = _native.call("encode", backend(), codec, _matrices(x), arrays | {"weights": weights}, sums)
    if stats is not None and sums is not None:
        stats.add(_stats(sums, x.size, codec.codebook_count))
    return finite


def supports_gptq(fmt: Format, search: ScaleSearch) -> bool:
    """Whether compiled code rounds with error feedback in this format with the candidates of this search."""
    return supports(fmt, search) and fmt.rounds_columns and fmt.block[0] == 1 < fmt.block[1]


def gptq_into(
    x: NDArray[Any],
    fmt: Format,
    search: ScaleSearch,
    judge_feedback: bool,
    arrays: dict[str, NDArray[Any] | None],
) -> None:
    """Round x [L, N, K] (contiguous, finite) with error feedback; only where ``supports_gptq`` is true.

    ``arrays``, all contiguous: ``global_scale`` FP32 [L]; ``judge`` and ``inner`` FP32 [K/B, B, B], ``gain`` FP32
    [K], ``outer`` FP32 [K/16, K, 16] as ``halfbyte.search.gptq_reference`` describes them; ``block_of`` int32 [K]
    where scales are given, for which B is 16; the results ``codes`` uint8 [L, N, K], ``scales`` and ``offsets``.
    """
    codec = describe(fmt, search)
    assert _native is not None and codec is not None
    _native.gptq(backend(), codec, x, judge_feedback, arrays)


def round_rows_into(
    fmt: Format, search: ScaleSearch, judge_feedback: bool, arrays: dict[str, NDArray[Any] | None]
) -> bool:
    """Round a group of rows as ``halfbyte.search.row_feedback.round_group`` does; False where NumPy must do it.

    ``arrays``: those of ``gptq_into`` without a global scale, ``x``, ``codes`` and ``error`` [R, K], ``coupling``.
    """
    if _native is None or not _native.couples_rows or not supports_gptq(fmt, search):
        return False
    codec, x = describe(fmt, search), arrays["x"]
    assert codec is not None and x is not None
    _native.group("round_rows", backend(), codec, arrays, n=len(x), k=x.shape[1], judge_feedback=judge_feedback)
    return True


def subtract_products(out: NDArray[np.float32], left: NDArray[np.float32], right: NDArray[np.float32]) -> bool:
    """Take left [S, M] transposed times right [S, K] from out [M, K]; False where NumPy must do it."""
    if backend() == _REFERENCE or _native is None or not _native.couples_rows:
        return False
    _native.subtract_products(backend(), out, left, right)
    return True


def descend_into(fmt: Format, arrays: dict[str, NDArray[Any] | None], margin: float, limit: int) -> int | None:
    """Move the codes of a group of ``halfbyte.search.descent``: how many moves; None where NumPy must do it."""
    codec = describe(fmt, None) if backend() != _REFERENCE and fmt.block[0] == 1 < fmt.block[1] else None
    if _native is None or codec is None or not _native.couples_rows:
        return None
    moves, values = np.zeros(1, np.int64), arrays["values"]
    assert values is not None
    n, k = values.shape
    _native.group("descend", backend(), codec, arrays | {"moves": moves}, n=n, k=k, margin=margin, limit=limit)
    return int(moves[0])


def factor_into(matrices: NDArray[np.float64], inverse: NDArray[np.float64], gain: NDArray[np.float64]) -> bool | None:
    """Factor symmetric matrices [L, K, K] (K a multiple of 8) as L L^T, each L column over its diagonal, in place.

    ``matrices`` become the transposes of those L, ``inverse`` their inverses, ``gain`` [L, K] the squares of the
    diagonals; the same bits on every machine. False where one is not positive definite, None without kernels.
    """
    if backend() == _REFERENCE or _native is None or matrices.shape[-1] % 8:
        return None
    return _native.factor(backend(), matrices, inverse, gain)


def decode_into(tensor: QuantizedTensor, out: NDArray[Any]) -> bool:
    """Decode into ``out`` (contiguous FP32 or BF16, the tensor's shape); False where the reference must do it."""
    codec = describe(tensor.format, None) if backend() != _REFERENCE else None
    if codec is None or _native is None or out.dtype not in _DECODED or not out.flags.c_contiguous:
        return False
    arrays = _arrays(tensor)
    if arrays is None:
        return False
    _native.call("decode", backend(), codec, _matrices(out), arrays)
    return True


def rotate_into(x: NDArray[np.float32], size: int, steps: NDArray[np.uint8] | None, inverse: bool) -> bool:
    """``formats.rotation.rotate_reference`` by compiled code: x [L, N, K] is rotated in place; False without any."""
    if backend() == _REFERENCE or _native is None:
        return False
    _native.rotate(backend(), x, size, float(norm(size)), steps, inverse)
    return True


def compare(tensor: QuantizedTensor, source: NDArray[Any], stats: ErrorStats) -> bool:
    """Add the error of a tensor against ``source`` (BF16, FP16 or FP32, its shape) to ``stats``.

    False where a decoded value is a NaN or an infinity. Of a format in rotated space blocks are looked at there, and
    values as they are decoded, so that equal ones have no error.
    """
    blocks, seen = tensor.format.in_block_space(tensor, source)
    sums = ErrorStats()
    finite = _compare(blocks, seen, sums)
    if blocks is not tensor:
        wide = source.astype(np.float32)
        error = (tensor.decode() - wide).astype(np.float64)
        sums.squared_error, sums.squares = float(np.sum(error * error)), float(np.sum(wide.astype(np.float64) ** 2))
        sums.max_error = float(np.abs(error).max(initial=0))
    stats.add(sums)
    return finite


def _compare(tensor: QuantizedTensor, source: NDArray[Any], stats: ErrorStats) -> bool:
    codec = describe(tensor.format, None) if backend() != _REFERENCE else None
    arrays = _arrays(tensor) if codec is not None and source.dtype.name in _SOURCES else None
    if codec is None or _native is None or arrays is None:
        sums = reference_stats(tensor, source)
        stats.add(sums)
        return bool(np.isfinite(sums.squared_error))
    native = NativeStats()
    finite = _native.call("compare", backend(), codec, _matrices(np.ascontiguousarray(source)), arrays, native)
    stats.add(_stats(native, source.size, codebook_count(tensor)))
    return finite


def _matrices(array: NDArray[Any]) -> NDArray[Any]:
    """[..., N, K] as [L, N, K]."""
    return array.reshape((-1, *array.shape[-2:]) if array.ndim > 1 else (1, 1, -1))


def _arrays(tensor: QuantizedTensor) -> dict[str, NDArray[Any] | None] | None:
    """The arrays of a tensor as kernels want them, or None where they are not what the format says."""
    arrays: dict[str, NDArray[Any] | None] = {"global_scale_inv": None}
    for name, (dtype, shape) in tensor.format.parts(tensor.shape).items():
        array = getattr(tensor, name)
        if name == "global_scale" and tensor.global_scale_inv is not None:
            name, array = "global_scale_inv", tensor.global_scale_inv
        if array is None or array.shape != shape or array.dtype != dtype:
            return None
        arrays[name] = np.require(array, requirements=("C", "A"))
    return arrays


def _stats(sums: NativeStats, elements: int, codebooks: int) -> ErrorStats:
    return ErrorStats(
        elements, sums.squared_error, sums.squares, sums.max_error, sums.saturated, list(sums.blocks[:codebooks])
    )


_native = _load()
_default = _choose(os.environ.get("HALFBYTE_ISA"))
_chosen: ContextVar[str | None] = ContextVar("halfbyte_backend", default=None)
