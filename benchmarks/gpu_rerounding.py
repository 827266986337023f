"""What it costs to bring MixFP4 weights, and activations, into types that tensor cores multiply.

    python benchmarks/gpu_rerounding.py

Relative squared errors, on Gaussian and heavy-tailed (Student t, 5) matrices and on the bundled model: of the weights
against their source, after re-rounding, and of products y = x W^T against those in FP64.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from halfbyte.demo import MODEL
from halfbyte.formats import QuantizedTensor
from halfbyte.formats.codebooks import E2M1
from halfbyte.formats.packing import unpack_nibbles
from halfbyte.search import encode


def sources() -> dict[str, np.ndarray[Any, Any]]:
    """Matrices by name."""
    from safetensors.numpy import load_file

    r = np.random.default_rng(0)
    tensors = load_file(MODEL / "model.safetensors")
    largest = max((t for t in tensors.values() if t.ndim == 2 and t.shape[1] % 64 == 0), key=lambda t: t.size)
    return {
        "Gaussian": r.standard_normal((512, 1024)).astype(np.float32),
        "Student t, 5": r.standard_t(5, (512, 1024)).astype(np.float32),
        "bundled model": largest[:2048].astype(np.float32),
    }


def relative(found: Any, wanted: Any) -> float:
    """Sum of squared differences over the sum of squares."""
    return float(((found.astype(np.float64) - wanted) ** 2).sum() / (wanted.astype(np.float64) ** 2).sum())


def in_e2m1(tensor: QuantizedTensor) -> np.ndarray[Any, Any]:
    """The weights with the integers of INT blocks rounded to E2M1, scales as they are (5 to 4, 7 to 6)."""
    scales, chosen = tensor.format.decode_scales(tensor)  # type: ignore[attr-defined]
    assert chosen is not None
    values = tensor.format.codebooks[1].array[unpack_nibbles(tensor.codes)]
    integers = np.repeat(chosen == 1, 16, axis=-1)
    rounded = E2M1.array[E2M1.encode(values)] * np.repeat(scales, 16, axis=-1)
    return np.where(integers, rounded, tensor.decode())


def in_fp8(values: np.ndarray[Any, Any], block: int) -> np.ndarray[Any, Any]:
    """Values in E4M3: blocks of K with a power-of-two scale (MXFP8) for ``block`` > 0, else a scale per row."""
    split = values.reshape(len(values), -1, block) if block else values[:, None]
    amax = np.abs(split).max(axis=-1, keepdims=True)
    amax[amax == 0] = 1
    scale = np.exp2(np.ceil(np.log2(amax / 448))) if block else amax / 448
    rounded = (split / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return rounded.reshape(values.shape)


def main() -> None:
    """Print a table."""
    columns = ["source", "INT blocks", "MixFP4", "NVFP4", "INT blocks as E2M1", "W as MXFP8", "W as FP8 per row"]
    products = ["y: A16", "y: A8 per token", "y: A8 MX", "y: W8A8 per row", "y: NVFP4 A4"]
    print("| " + " | ".join([*columns, *products]) + " |\n" + "|---" * 12 + "|")
    for name, weight in sources().items():
        tensor = encode(weight, "mixfp4", "sweep")
        held = tensor.decode()
        shares = [float((tensor.codebooks == 1).mean())]
        errors = [held, encode(weight, "nvfp4", "sweep").decode(), in_e2m1(tensor), in_fp8(held, 32), in_fp8(held, 0)]
        x = np.random.default_rng(1).standard_t(4, (256, weight.shape[1])).astype(np.float32)
        exact = x.astype(np.float64) @ weight.T.astype(np.float64)
        four = encode(x, "nvfp4", "absmax").decode()
        pairs = [(x, held), (in_fp8(x, 0), held), (in_fp8(x, 32), held), (in_fp8(x, 0), in_fp8(held, 0)), (four, held)]
        found = [relative(a.astype(np.float64) @ w.T.astype(np.float64), exact) for a, w in pairs]
        cells = [f"{shares[0]:.0%}", *(f"{1e3 * relative(e, weight):.2f}" for e in errors)]
        print("| " + " | ".join([name, *cells, *(f"{1e3 * f:.2f}" for f in found)]) + " |")


if __name__ == "__main__":
    main()
