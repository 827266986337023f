"""Random quantized weights of every format that has a compiled product, and what a product is compared with."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import AffineFormat, BlockFormat, QuantizedTensor, get_format, list_formats
from halfbyte.kernels import linear
from halfbyte.kernels.linear_layout import describe_weight

PRODUCT_FORMATS = [name for name in list_formats() if describe_weight(get_format(name)) is not None]
FP32_ONLY = ("fp8_tensor", "fp8_channel", "fp8_block128", "mxfp8", "nf4")  # no integers: int8 runs like exact
ISAS = linear.isas()


def columns(name: str, blocks: int) -> int:
    """Columns of so many blocks; a ragged number where a format allows it."""
    block = get_format(name).block[1]
    return 48 * blocks + 7 if block < 0 or get_format(name).block[0] > 1 else block * blocks


def weight(name: str, shape: tuple[int, ...], seed: int = 0, selector: str = "mixed") -> QuantizedTensor:
    """Random codes and scales; selector bits "mixed", all "zero" or all "one"."""
    fmt = get_format(name)
    r = np.random.RandomState(seed)
    arrays: dict[str, Any] = {}
    for part, (dtype, size) in fmt.parts(shape).items():
        arrays[part] = _draw(part, np.dtype(dtype), size, r)
    if isinstance(fmt, AffineFormat) and fmt.offset == "bias":
        middle = fmt.levels / 2 * r.uniform(0.8, 1.2, arrays["offsets"].shape)
        arrays["offsets"] = (-middle * arrays["scales"].astype(np.float32)).astype(ml_dtypes.bfloat16)
    fmt = fmt.plain
    if isinstance(fmt, BlockFormat):
        if fmt.bits == 8 and fmt.codebooks[0].kind == "e4m3":
            arrays["codes"][arrays["codes"] & 0x7F == 0x7F] = 0x7E
        if arrays["scales"].dtype == np.uint8:
            low, high = (117, 130) if fmt.scale.name == "e8m0" else (8, 62) if fmt.scale.bits == 6 else (8, 126)
            scales = r.randint(low, high, arrays["scales"].shape)
            extra = {"mixed": r.randint(0, 256, scales.shape), "zero": 0, "one": 255}[selector]
            mask = 255 & ~((1 << fmt.scale.bits) - 1) if len(fmt.codebooks) > 1 else 0
            arrays["scales"] = (scales | (extra & mask)).astype(np.uint8)
    return QuantizedTensor(get_format(name), shape, **arrays)


def _draw(part: str, dtype: np.dtype[Any], size: tuple[int, ...], r: np.random.RandomState) -> NDArray[Any]:
    if part == "rotation":
        return r.randint(0, 64, size).astype(np.uint8)
    if dtype == np.uint32:  # HiF4: E6M2 in the low byte, exponent bits above
        return (r.randint(0, 1 << 24, size).astype(np.uint32) << 8) | r.randint(150, 210, size).astype(np.uint32)
    if dtype == np.uint8:
        return r.randint(0, 256 if part == "codes" else 16, size).astype(np.uint8)
    values = np.exp(r.uniform(-4, 0, size))
    return np.asarray(values, dtype=np.float32).astype(dtype)


def activations(rows: int, k: int, seed: int = 1, dtype: Any = np.float32) -> NDArray[Any]:
    """Gaussian rows of different sizes."""
    r = np.random.RandomState(seed)
    x = r.standard_normal((rows, k)) * np.exp(r.uniform(-3, 3, (rows, 1)))
    return x.astype(np.float32).astype(dtype)


def expected(x: NDArray[Any], tensor: QuantizedTensor, bias: Any = None) -> NDArray[np.float64]:
    """The product with the decoded weight in FP64."""
    y = x.astype(np.float64) @ tensor.decode().astype(np.float64).T
    return y if bias is None else y + bias


def miss(y: NDArray[Any], wanted: NDArray[np.float64]) -> float:
    """The largest relative error of a row, by norms."""
    return float(
        np.max(np.linalg.norm(y.astype(np.float64) - wanted, axis=-1) / (np.linalg.norm(wanted, axis=-1) + 1e-300))
    )


def as_bf16(x: NDArray[Any]) -> NDArray[Any]:
    """Rounded to BF16."""
    return x.astype(ml_dtypes.bfloat16)


def rounded_to_int8(x: NDArray[Any]) -> NDArray[np.float64]:
    """What ``mode="int8"`` makes of activations: int8 times a scale for each 32 columns."""
    padded = np.zeros((len(x), -(-x.shape[1] // 32) * 32), dtype=np.float32)
    padded[:, : x.shape[1]] = x.astype(np.float32)
    groups = padded.reshape(len(x), -1, 32)
    amax = np.abs(groups).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(groups * np.where(amax > 0, np.float32(127) / amax, np.float32(0)))
    values = codes.astype(np.float64) * (amax / np.float32(127))
    return values.reshape(len(x), -1)[:, : x.shape[1]]
