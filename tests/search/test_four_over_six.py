"""Four Over Six (arXiv 2512.02010): the published example, the FP32 order, and the scale range it leaves."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from formats.streams import gaussian, laplace
from halfbyte.search import encode

EXAMPLE = np.array([[10, 20, 30, 40] * 4], dtype=np.float32)


def test_the_published_block_is_exact_when_its_maximum_becomes_four() -> None:
    six = encode(EXAMPLE, "nvfp4", "absmax", global_scale=1.0)
    assert six.decode()[0, :4].tolist() == [9.75, 19.5, 26, 39]
    assert np.mean((six.decode() - EXAMPLE) ** 2) == pytest.approx(4.33, abs=0.005)
    four = encode(EXAMPLE, "nvfp4", "four_over_six", global_scale=1.0)
    assert np.array_equal(four.decode(), EXAMPLE)
    assert four.scales[0, 0].view(ml_dtypes.float8_e4m3fn) == 10


def test_every_scale_is_one_of_the_two_candidates() -> None:
    x = laplace()
    q = encode(x, "nvfp4", "four_over_six")
    amax = np.abs(x).max()
    base = np.abs(x.reshape(-1, 16)).max(axis=1) / np.float32(6) * (np.float32(1536) / amax)
    six, four = ((base * f).astype(ml_dtypes.float8_e4m3fn).view(np.uint8) for f in (np.float32(1), np.float32(1.5)))
    found = q.scales.reshape(-1)
    assert ((found == six) | (found == four)).all()
    assert found.view(ml_dtypes.float8_e4m3fn).astype(np.float32).max() <= 384


def plain(x: np.ndarray, amax: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """The method step by step in FP32: values [n, 16] and whether a block maps its maximum to four."""
    f = np.float32
    encode_scale = f(1536) / amax
    decode_scale = f(1) / (f(1536) / amax)
    base = np.abs(x).max(axis=1) / f(6) * encode_scale
    values, errors = [], []
    for factor in (f(1), f(1.5)):
        scale = (base * factor).astype(ml_dtypes.float8_e4m3fn).astype(f)
        z = x * (f(1) / (decode_scale * scale))[:, None]
        grid = z.astype(ml_dtypes.float4_e2m1fn).astype(f)
        deq = grid * scale[:, None] * amax / f(1536)
        error = f(0)
        for column in ((deq - x) ** 2).T:
            error = error + column
        values.append(grid * (scale * (amax / f(1536)))[:, None])
        errors.append(error)
    four = errors[1] < errors[0]
    return np.where(four[:, None], values[1], values[0]), four


def test_the_choice_of_every_block_follows_the_fp32_order() -> None:
    x = gaussian().reshape(-1, 16)
    values, four = plain(x, np.abs(x).max())
    q = encode(gaussian(), "nvfp4", "four_over_six")
    assert np.array_equal(q.decode().reshape(-1, 16), values)
    codes = np.stack([q.codes & 7, q.codes >> 4 & 7], -1).reshape(-1, 16)
    assert np.array_equal(codes.max(axis=1) < 7, four)


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**-40, 2.0**60, 2.0**100])
def test_the_choice_does_not_depend_on_the_size_of_the_weights(factor: float) -> None:
    # squares of such weights leave the range of FP32
    x = gaussian()[:64]
    plain_size, scaled = encode(x, "nvfp4", "four_over_six"), encode(x * np.float32(factor), "nvfp4", "four_over_six")
    assert np.array_equal(plain_size.codes, scaled.codes)
    assert np.array_equal(plain_size.scales, scaled.scales)


@pytest.mark.parametrize(
    ("search", "norm"), [("four_over_six", 2), ("four_over_six_mae", 1), ("four_over_six_absmax", np.inf)]
)
def test_each_metric_minimises_its_own_norm(search: str, norm: float) -> None:
    x = laplace()[:128]

    def errors(name: str) -> np.ndarray:
        return np.linalg.norm((encode(x, "nvfp4", name).decode() - x).reshape(-1, 16), ord=norm, axis=1)

    own = errors(search)
    for other in ("four_over_six", "four_over_six_mae", "four_over_six_absmax"):
        assert (own <= errors(other) * (1 + 1e-5)).all()
