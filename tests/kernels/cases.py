"""Weights that try the kernels, and the comparison with the reference."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from formats.cases import CASES, FORMATS, draw
from halfbyte import kernels
from halfbyte.formats import Format, QuantizedTensor
from halfbyte.search import encode

NATIVE = kernels.backends()[:-1]
WITH_KERNELS = [name for name in FORMATS if name not in kernels.NUMPY_ONLY]
KERNEL_CASES = [case for case in CASES if case[0] in WITH_KERNELS]
QUICK_KERNEL_CASES = [case for case in KERNEL_CASES if case[1] != "exhaustive"]
TYPES = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}


def width(fmt: Format, blocks: int) -> int:
    """Columns of so many blocks; whole rows and tiles get a length that no vector divides."""
    columns = fmt.block[1]
    return columns * blocks if 0 < columns <= 128 and fmt.block[0] == 1 else 64 * blocks + 7


def adversarial(fmt: Format) -> NDArray[np.float32]:
    """Rows of what goes wrong: zeros of both signs, subnormals, the ends of FP32, ties, lone elements."""
    k = width(fmt, 5)
    r = np.random.RandomState(3)
    x = r.standard_normal((18, k)).astype(np.float32)
    x[0], x[1] = 0, -0.0
    x[2] *= np.float32(1e-39)
    x[3] *= np.float32(1e37)
    x[4] = np.sign(x[4])
    x[5] = r.randint(-24, 25, size=k) / 4
    x[6] = 0
    x[6, :: max(1, k // 5)] = r.standard_normal(len(x[6, :: max(1, k // 5)]))
    x[7] = np.where(np.arange(k) % 2, np.float32(1e-45), np.float32(-1e-45))
    x[8], x[9] = np.abs(x[8]), -np.abs(x[9])
    x[10, k // 2] = 3e38
    x[11] = np.float32(6.0)
    x[12] = np.where(np.arange(k) % 3, 0.25, 1.75) * np.float32(0.5)
    x[13] = -0.0
    x[13, -1] = 1e-30
    x[14] = np.float32(2.0**-126)
    x[15] *= np.geomspace(1e-20, 1e20, k).astype(np.float32)
    x[16] = np.where(r.uniform(size=k) < 0.5, np.float32(3.3e38), np.float32(-3.3e38))
    x[17] = np.arange(k) - k // 2
    return x


def inputs(fmt: Format) -> dict[str, NDArray[np.float32]]:
    """Named weights for a format: matrices, a stack of experts, single rows."""
    k = width(fmt, 7)
    found = {
        "gaussian": draw("normal", (9, k), 1) * np.float32(0.02),
        "heavy": draw("heavy", (5, k), 2),
        "ties": draw("steps", (4, k), 3),
        "stack": draw("normal", (3, 5, width(fmt, 3)), 4) * np.float32([[[1]], [[1e-3]], [[50]]]),
        "adversarial": adversarial(fmt),
        "one block": draw("normal", (1, width(fmt, 1)), 5),
    }
    if fmt.block[0] == 1:
        found["vector"] = draw("normal", (k,), 6)
    return found


def cast(x: NDArray[np.float32], dtype: Any) -> NDArray[Any]:
    """The weights in another type, without the infinities that a smaller range makes."""
    with np.errstate(over="ignore"):
        narrow = x.astype(dtype)
    return np.where(np.isfinite(narrow.astype(np.float32)), narrow, np.asarray(1, dtype=dtype))


def reference(x: NDArray[Any], fmt: Format, search: str, importance: Any = None, **options: Any) -> QuantizedTensor:
    """What NumPy makes of it."""
    with kernels.use_backend("reference"), np.errstate(all="ignore"):
        return encode(x, fmt, search, importance, **options)


def differences(ours: QuantizedTensor, theirs: QuantizedTensor) -> list[str]:
    """Names of the arrays that differ in any bit."""
    found = []
    for name in ("codes", "scales", "global_scale", "offsets", "global_scale_inv"):
        a, b = getattr(ours, name), getattr(theirs, name)
        if (a is None) != (b is None) or (a is not None and (a.shape != b.shape or a.tobytes() != b.tobytes())):
            found.append(name)
    return found
