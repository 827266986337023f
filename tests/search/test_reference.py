"""The reference encoder against an exhaustive search in FP64 that shares no code with it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from formats.cases import KINDS, draw
from halfbyte.formats import BlockFormat, get_format
from halfbyte.search import SEARCHES, encode

E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
TABLES = {
    "nvfp4": [[0, 0.5, 1, 1.5, 2, 3, 4, 6]],
    "nvint4": [[*range(8)]],
    "mixfp4": [[0, 0.5, 1, 1.5, 2, 3, 4, 6], [*range(8)]],
    "if4": [[0, 0.5, 1, 1.5, 2, 3, 4, 6], [v * 6 / 7 for v in range(8)]],
}
ONE_SIDED = {
    "razer": [[0, 0.5, 1, 1.5, 2, 3, 4, 5, 6, -0.5, -1, -1.5, -2, -3, -4, -6]],
    "iq4_nl": [[-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]],
}


def grids(name: str) -> list[np.ndarray]:
    """Signed values of each table; one-sided ones and their mirror images."""
    if name in ONE_SIDED:
        one = np.array(ONE_SIDED[name][0], dtype=np.float64)
        return [one, -one]
    return [np.array(sorted({*t, *(-v for v in t)}), dtype=np.float64) for t in TABLES[name]]


def least_error(block: np.ndarray, name: str, global_scale: float, codes: range | None) -> float:
    """Least squared error over the scale codes (a window around absmax where ``codes`` is None) and tables."""
    best = np.inf
    tops = {"if4": [6, 6], "mixfp4": [6, 7], "nvint4": [7]}.get(name, [np.abs(g).max() for g in grids(name)])
    for grid, top in zip(grids(name), tops, strict=True):
        amax = np.abs(block).max() / global_scale
        base = max(int(np.float32(min(amax / top, 448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)), 1)
        for code in codes or range(max(base - 3, 1), min(base + 8, 126) + 1):
            step = E4M3[code] * global_scale
            nearest = np.abs(block[:, None] / step - grid).min(axis=1) * step
            best = min(best, float((nearest**2).sum()))
    return best


@pytest.mark.parametrize("name", [*TABLES, *ONE_SIDED])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("constant", "steps")])
def test_the_sweep_finds_the_least_error_of_its_window(name: str, kind: str) -> None:
    x = draw(kind, (2, 64), 5)
    q = encode(x, name, "sweep")
    errors = ((q.decode().astype(np.float64) - x) ** 2).reshape(-1, 16).sum(axis=1)
    for block, error in zip(x.reshape(-1, 16).astype(np.float64), errors, strict=True):
        expected = least_error(block, name, float(q.global_scale), None) if block.any() else 0.0
        assert error == pytest.approx(expected, rel=1e-4, abs=1e-10 * float((block**2).sum()))


@pytest.mark.parametrize("name", ["nvfp4", "mixfp4", "iq4_nl"])
def test_exhaustive_finds_the_least_error_of_all_scales(name: str) -> None:
    x = draw("heavy", (1, 64), 6)
    q = encode(x, name, "exhaustive")
    errors = ((q.decode().astype(np.float64) - x) ** 2).reshape(-1, 16).sum(axis=1)
    for block, error in zip(x.reshape(-1, 16).astype(np.float64), errors, strict=True):
        expected = least_error(block, name, float(q.global_scale), range(1, 127))
        assert error == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("group", [16, 128])
def test_int4_tries_ranges_of_six_tenths_to_eleven_tenths(group: int) -> None:
    x = draw("heavy", (2, 256), 7)
    fmt = get_format(f"int4_g{group}")
    assert isinstance(fmt, BlockFormat)
    q = encode(x, fmt, "sweep")
    ratio = q.scales.astype(np.float64) / (np.abs(x.reshape(2, -1, group)).max(axis=2) / 7.5)
    assert ratio.min() > 0.595 and ratio.max() < 1.105
    errors = ((q.decode().astype(np.float64) - x) ** 2).reshape(-1, group).sum(axis=1)
    for block, error in zip(x.reshape(-1, group).astype(np.float64), errors, strict=True):
        scales = np.abs(block).max() / 7.5 * np.array(SEARCHES["sweep"].int_ratios)
        scales = scales.astype(ml_dtypes.bfloat16).astype(np.float64)
        codes = np.clip(np.rint(block[:, None] / scales), -8, 7)
        assert error == pytest.approx((((codes * scales) - block[:, None]) ** 2).sum(axis=0).min(), rel=1e-4)


def test_a_power_of_two_scale_is_the_best_of_three() -> None:
    x = draw("heavy", (4, 128), 8)
    errors = {
        s: ((encode(x, "mxfp4", s).decode().astype(np.float64) - x) ** 2).reshape(-1, 32).sum(axis=1)
        for s in ("absmax", "mx_even", "mx_rceil", "sweep")
    }
    least = np.minimum(np.minimum(errors["absmax"], errors["mx_even"]), errors["mx_rceil"])
    assert (errors["sweep"] <= least * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["fp8_block128", "fp8_channel", "mxfp8", "hif4", "affine4_g64", "int4_asym_g64"])
def test_sweeping_gains_on_heavy_tails(name: str) -> None:
    x = draw("heavy", (256, 512), 9)
    swept, plain = (np.linalg.norm(encode(x, name, s).decode() - x) for s in ("sweep", "absmax"))
    assert swept < plain
