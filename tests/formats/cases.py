"""What the registry offers, for tests that run over every format and search, and the weights they draw."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from halfbyte.formats import AffineFormat, BlockFormat, Format, HiF4Format, QuantizedTensor, get_format, list_formats
from halfbyte.formats.scales import E6M2
from halfbyte.search import SEARCHES
from halfbyte.search.blocks import to_blocks

# formats of rotated weights are the plain ones in another space: test_rotation.py holds what that adds
FORMATS = [f for f in list_formats() if getattr(get_format(f), "rotation", None) is None]
CASES = [(f, s) for f in FORMATS for s in SEARCHES if SEARCHES[s].problem(get_format(f)) is None]
QUICK = [(f, s) for f, s in CASES if s != "exhaustive"]
TENSOR_SCALED = [f for f in FORMATS if "global_scale" in get_format(f).parts((64, 256))]

# block scales below which a type's steps are too coarse for absmax to find a scale again: subnormals and a margin
FINE_FROM = {"e4m3": 2.0**-4, "e3m3": 2.0**-4, "fp16": 2.0**-12}

KINDS = ("normal", "heavy", "uniform", "sparse", "steps", "constant", "outlier", "ramp")


def draw(kind: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Weights of about unit size: ``steps`` lie on halves (many ties), ``ramp`` spans six decades along K."""
    r = np.random.RandomState(seed)
    x = {
        "normal": lambda: r.standard_normal(shape),
        "heavy": lambda: r.standard_t(2, size=shape),
        "uniform": lambda: r.uniform(-1, 1, shape),
        "sparse": lambda: r.standard_normal(shape) * (r.uniform(size=shape) < 0.1),
        "steps": lambda: r.randint(-12, 13, size=shape) / 2,
        "constant": lambda: np.full(shape, r.standard_normal()),
        "outlier": lambda: r.standard_normal(shape) * np.where(r.uniform(size=shape) < 0.01, 1000, 1),
        "ramp": lambda: r.standard_normal(shape) * np.geomspace(1e-6, 1, shape[-1]),
    }[kind]()
    return x.astype(np.float32)


def shape_for(fmt: Format, rows: int = 2, blocks: int = 3) -> tuple[int, int]:
    """A small matrix that the format holds; tiles are cut at the edge."""
    columns = fmt.block[1]
    if fmt.block[0] > 1:
        return (fmt.block[0] // 2 + rows, columns + 7 * blocks)
    return (rows, columns * blocks if columns > 0 else 37 * blocks)


@st.composite
def weights(draw_from: st.DrawFn, name: str, decades: int = 8) -> NDArray[np.float32]:
    """A matrix for the format: any kind, a few blocks, sizes of 10**-decades to 10**decades."""
    fmt = get_format(name)
    shape = shape_for(fmt, draw_from(st.integers(1, 3)), draw_from(st.integers(1, 4)))
    kind = draw_from(st.sampled_from(KINDS))
    size = 10.0 ** draw_from(st.integers(-decades, decades))
    return draw(kind, shape, draw_from(st.integers(0, 1 << 20))) * np.float32(size)


def same_scale(tensor: QuantizedTensor) -> dict[str, NDArray[np.float32]]:
    """Arguments of ``encode`` that give another array the global scale of this one."""
    return {} if tensor.global_scale is None else {"global_scale": tensor.global_scale}


def scale_values(tensor: QuantizedTensor) -> NDArray[np.float32]:
    """FP32 values of the stored scales, without the global scale."""
    fmt = tensor.format
    if isinstance(fmt, BlockFormat):
        return fmt.split_scales(tensor.scales)[0]
    if isinstance(fmt, HiF4Format):
        return E6M2.to_value(tensor.scales & np.uint32(255))
    assert isinstance(fmt, AffineFormat)
    return tensor.scales.astype(np.float32)


def fine_scales(tensor: QuantizedTensor) -> NDArray[np.bool_]:
    """[blocks]: which scales lie where their type has its full precision."""
    fmt = tensor.format
    from_here = FINE_FROM.get(fmt.scale.name, 0.0) if isinstance(fmt, BlockFormat) else 0.0
    return scale_values(tensor).reshape(-1) >= from_here


def reach(fmt: Format) -> tuple[float, float]:
    """Block maxima between which a format keeps its precision, whatever the rest of the tensor is."""
    if isinstance(fmt, HiF4Format):
        return 2.0**-48, 2.0**18
    # BF16 scales end where FP32 turns subnormal, ranges of 2 * 3e38 overflow
    if not isinstance(fmt, BlockFormat) or fmt.has_global_scale or fmt.scale.name not in FINE_FROM:
        return 1e-35, 1e35
    tops = [codebook.top for codebook in fmt.codebooks]
    return FINE_FROM[fmt.scale.name] * max(tops), fmt.scale.maximum * min(tops)


def smallest_magnitude(fmt: Format) -> float:
    """Of the table's values, without scales: 0 in all tables but IQ4_NL's."""
    return min(abs(v) for t in fmt.codebooks for v in t.values) if isinstance(fmt, BlockFormat) else 0.0


def by_block(array: NDArray[np.floating], fmt: Format) -> NDArray[np.floating]:
    """[blocks, elements] of a matrix."""
    blocks = to_blocks(array[None], fmt.block)
    return blocks.reshape(-1, blocks.shape[-1])


def block_errors(
    tensor: QuantizedTensor, x: NDArray[np.float32], importance: NDArray[np.float32] | None = None, metric: str = "sse"
) -> NDArray[np.float64]:
    """(Weighted) error of each block in FP64: root of the squares' sum, sum of magnitudes, or the largest."""
    error = np.abs(tensor.decode().astype(np.float64) - x)
    weight = np.ones(x.shape[-1]) if importance is None else importance.astype(np.float64)
    if metric == "sse":
        return np.sqrt(by_block(error**2 * weight, tensor.format).sum(axis=1))
    terms = by_block(error * weight, tensor.format)
    return terms.sum(axis=1) if metric == "mae" else terms.max(axis=1)


def not_above(a: NDArray[np.float64], b: NDArray[np.float64], x: NDArray[np.float64]) -> bool:
    """a <= b block by block, but for the rounding of FP32 losses; ``x`` is the size of each block."""
    return bool((a <= b * (1 + 1e-5) + 1e-6 * x).all())


def block_sizes(x: NDArray[np.float32], fmt: Format) -> NDArray[np.float64]:
    """Root of the sum of squares of each block."""
    return np.sqrt((by_block(x.astype(np.float64), fmt) ** 2).sum(axis=1))
