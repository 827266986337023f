"""Runs every product and checks it: a program for sanitizer builds, and for instruction sets that are emulated.

Arguments: a library (or "-" for the usual one) and the instruction sets to run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from halfbyte.kernels import linear, linear_runtime
from halfbyte.kernels.linear import PackedDense, PackedExperts, PackedLinear
from halfbyte.kernels.linear_native import LinearNative
from kernels.linear_cases import (
    FP32_ONLY,
    PRODUCT_FORMATS,
    activations,
    as_bf16,
    columns,
    expected,
    miss,
    rounded_to_int8,
    weight,
)


def check_format(name: str) -> int:
    """Both modes, all kinds of activations, batches that use every tile."""
    n = 150 if name == "fp8_block128" else 21
    tensor = weight(name, (n, columns(name, 3)))
    plain = weight(name, tensor.shape)
    if name in ("mxfp4_hadamard", "mxfp4_duquant"):
        plain.format = plain.format.plain
    packed = PackedLinear(tensor, np.linspace(-1, 1, n))
    x = activations(33, packed.k)
    for rows in (1, 7, 33):
        for part in (x[:rows], as_bf16(x[:rows])):
            assert miss(packed(part), expected(part, tensor, packed.weight.bias)) <= 1e-6, (name, rows, part.dtype)
            turned = part.astype(np.float32)
            if plain.format is not tensor.format:
                tensor.format.rotate_in_place(turned, tensor.rotation)
            if name not in FP32_ONLY:
                wanted = expected(rounded_to_int8(turned), plain, packed.weight.bias)
                assert miss(packed(part, "int8"), wanted) <= 2e-6, (name, rows, part.dtype)
    for mode in ("exact", "int8"):
        for part in (x, as_bf16(x)):
            alone = np.concatenate([packed(part[t : t + 1], mode) for t in range(33)])
            assert packed(part, mode).tobytes() == alone.tobytes(), (name, mode)
    packed.unpack()
    return 12


def check_others() -> int:
    """Dense products, mixtures of experts, threads."""
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        for k in (5, 96):
            w = activations(9, k, 2).astype(dtype)
            for x in (activations(7, k), as_bf16(activations(7, k)), activations(7, k).astype(np.float16)):
                wanted = x.astype(np.float64) @ w.astype(np.float64).T
                assert miss(PackedDense(w)(x), wanted) <= 1e-6, (dtype, k, x.dtype)
    chosen = np.array([[0, 2], [2, 9], [1, 0]])
    for name in ("mixfp4", "mxfp4_duquant"):
        experts = PackedExperts(weight(name, (3, 64, 64)), weight(name, (3, 24, 32), 1), activation="gelu_tanh")
        for threads in (1, 3):
            linear.set_threads(threads)
            for mode in ("exact", "int8"):
                experts(as_bf16(activations(3, 64)), chosen, np.ones((3, 2)), mode, dtype=np.float16)
    wide = PackedLinear(weight("mixfp4", (1040, 1024)))
    assert wide(activations(3, 1024), dtype=ml_dtypes.bfloat16).shape == (3, 1040)
    linear.set_threads(1)
    return 18 + 8 + 1


if __name__ == "__main__":
    library, *names = sys.argv[1:]
    if library != "-":
        given = LinearNative(Path(library))
        linear_runtime.load = lambda: given
    for isa in names:
        with linear.use_isa(isa):
            checked = sum(check_format(name) for name in PRODUCT_FORMATS) + check_others()
            print(isa, checked)
