"""Fake quantization by compiled code: what training asks of formats in every forward pass.

Each function equals its NumPy definition bit for bit, and gives None where NumPy has to do the work.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import Codebook, QuantizedTensor
from halfbyte.formats.given_scales import inverse_of, thresholds
from halfbyte.kernels import backend
from halfbyte.kernels.codec import understands
from halfbyte.kernels.native import find

Floats = NDArray[np.float32]
_INTERFACE = 1
_ISAS = {"avx512": 2, "avx2": 1, "baseline": 0}
_POINTERS = (
    *("thresholds", "level_codes", "values", "inverse_global", "inverse", "scale", "lowest", "highest", "chosen"),
    *("codes", "out", "passes"),
)


class _RoundTask(ctypes.Structure):
    """``hb_round_task``."""

    _fields_ = (
        ("x", c_void_p),
        ("lead", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("columns", c_int64),
        *((name, c_void_p) for name in _POINTERS),
    )


@cache
def _library() -> Any:
    """The library, None where there is none with these functions."""
    path = find((str(Path(__file__).parent),))
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        if library.hb_fake_quantize_interface() != _INTERFACE * 1000003 + ctypes.sizeof(_RoundTask):
            return None
        library.hb_round_given.argtypes = (ctypes.c_int, c_void_p)
    except (OSError, AttributeError):
        return None
    return library


def round_given(tensor: QuantizedTensor, x: Floats) -> tuple[QuantizedTensor, Floats, NDArray[np.bool_]] | None:
    """x [..., N, K] rounded to the scales of a tensor, as ``Format.round_to`` defines it, in one pass.

    The tensor with its new codes, their FP32 values, and where x is between both ends of its block.
    """
    fmt = tensor.format
    isa, library = _ISAS.get(backend()), _library()
    rows, columns = fmt.block
    if isa is None or library is None or rows != 1 or columns <= 0 or columns % 16 or len(tensor.shape) < 2:
        return None
    if not fmt.codebooks or fmt.bits != 4 or fmt.rotation is not None or not understands(fmt):
        return None
    tables = _tables(fmt.codebooks)
    scales, chosen = fmt.split_scales(tensor.scales)
    lead = (..., None, None)
    factors = scales
    if tensor.global_scale_inv is not None:
        factors = scales / tensor.global_scale_inv[lead]
    elif tensor.global_scale is not None:
        factors = scales * tensor.global_scale[lead]
    whole = None if tensor.global_scale is None else inverse_of(tensor.global_scale)
    codes = np.empty(tensor.codes.shape, np.uint8)
    values, passes = np.empty(tensor.shape, np.float32), np.empty(tensor.shape, np.bool_)
    arrays = dict(zip(_POINTERS, (*tables[:3], whole, inverse_of(scales), factors, *tables[3:], chosen), strict=False))
    arrays |= {"codes": codes, "out": values, "passes": passes}
    held = {name: None if a is None else np.require(a, requirements="C") for name, a in arrays.items()}
    source = np.require(x, np.float32, "C")
    n, k = tensor.shape[-2:]
    task = _RoundTask(
        x=source.ctypes.data,
        lead=source.size // max(n * k, 1),
        n=n,
        k=k,
        columns=columns,
        **{name: None if a is None else a.ctypes.data for name, a in held.items()},
    )
    status = library.hb_round_given(isa, ctypes.byref(task))
    if status:
        raise RuntimeError(f"the native kernel hb_round_given refused its arguments (status {status})")
    return replace(tensor, codes=codes), values, passes


@lru_cache(maxsize=64)
def _tables(codebooks: tuple[Codebook, ...]) -> tuple[NDArray[Any], ...]:
    """Thresholds, codes of levels, values by code, lowest and highest value of each codebook."""
    ends = np.full((len(codebooks), 16), np.inf, np.float32)
    codes = np.empty((len(codebooks), 16), np.uint8)
    for i, codebook in enumerate(codebooks):
        ends[i, :15], codes[i] = thresholds(codebook)
    values = np.stack([codebook.array for codebook in codebooks])
    used = [np.delete(codebook.array, list(codebook.unused)) for codebook in codebooks]
    low, high = (np.array([f(u) for u in used], np.float32) for f in (np.min, np.max))
    return ends, codes, values, low, high
