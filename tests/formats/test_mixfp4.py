"""The conventions of mixed FP4/INT4 blocks side by side: which bit, which nibble, which scale, which tie."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.formats import QuantizedTensor, get_format
from halfbyte.search import encode

ONE = 0x38  # E4M3 of 1.0
NAMES = ["mixfp4", "mixfp4_makora", "mixfp4_paper", "mixfp4_twos_complement", "if4"]


def decode(name: str, codes: list[int], scale_byte: int) -> list[float]:
    """First values of a block of 16 that starts with these codes."""
    full = np.array(codes + [0] * (16 - len(codes)), dtype=np.uint8)
    packed = (full[0::2] | full[1::2] << 4)[None]
    scales = np.array([[scale_byte]], dtype=np.uint8)
    return QuantizedTensor(get_format(name), (1, 16), packed, scales, np.float32(1)).decode()[0, : len(codes)].tolist()


@pytest.mark.parametrize(
    ("name", "bit7", "values"),
    [
        ("mixfp4", 0, [1.5, 6.0, -1.5, -6.0]),
        ("mixfp4", 1, [3.0, 7.0, -3.0, -7.0]),
        ("mixfp4_makora", 0, [3.0, 7.0, -3.0, -7.0]),
        ("mixfp4_makora", 1, [1.5, 6.0, -1.5, -6.0]),
        ("mixfp4_paper", 1, [3.0, 7.0, -3.0, -7.0]),
        ("mixfp4_twos_complement", 0, [1.5, 6.0, -1.5, -6.0]),
        ("mixfp4_twos_complement", 1, [3.0, 7.0, -5.0, -1.0]),
        ("if4", 0, [1.5, 6.0, -1.5, -6.0]),
        ("if4", 1, [3 * np.float32(6 / 7), 6.0, -5 * np.float32(6 / 7), -np.float32(6 / 7)]),
    ],
)
def test_the_same_bytes_mean_different_numbers(name: str, bit7: int, values: list[float]) -> None:
    assert decode(name, [3, 7, 11, 15], ONE | bit7 << 7) == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["fp4", "int4"])
def test_a_block_on_one_grid_is_written_and_read_without_loss(name: str, kind: str) -> None:
    step = np.float32(6 / 7) if name == "if4" else np.float32(1)
    fp4 = np.array([0.5, -1.5, 3, 4, -6, 2, 1, 0, 6, -0.5, 1, 2, 3, 4, -4, -2], dtype=np.float32)
    int4 = np.array([1, -5, 3, 4, -7, 2, 5, 0, 7, -3, 1, 2, 3, 5, -6, -2], dtype=np.float32) * step
    x = (fp4 if kind == "fp4" else int4)[None]
    q = encode(x, name, "absmax", global_scale=1.0)
    assert np.array_equal(q.decode(), x)
    bit = int(q.scales[0, 0] >> 7)
    assert bit == (kind == "int4") if name != "mixfp4_makora" else bit == (kind == "fp4")


@pytest.mark.parametrize(("name", "selector"), [("mixfp4", 0), ("mixfp4_makora", 1), ("mixfp4_paper", 1)])
def test_a_tie_goes_to_the_table_of_the_convention(name: str, selector: int) -> None:
    # halves of 1, 2, 3, 4, 6 lie on both grids; FP4 wins but for the paper, whose INT4 wins
    x = np.array([[0.5, -1, 1.5, 2, 3] + [0] * 11], dtype=np.float32)
    q = encode(x, name, "sweep", global_scale=1.0)
    assert np.array_equal(q.decode(), x)
    assert q.codebooks.tolist() == [[selector]]


def test_int_blocks_use_their_own_scale_in_mixfp4_and_the_shared_one_in_if4() -> None:
    x = np.arange(-7, 9, dtype=np.float32).clip(-7, 7)[None]
    own, shared = encode(x, "mixfp4", "absmax", global_scale=1.0), encode(x, "if4", "absmax", global_scale=1.0)
    assert own.scales[0, 0] == ONE | 128
    assert shared.scales[0, 0] & 127 == encode(x, "nvfp4", "absmax", global_scale=1.0).scales[0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_minus_eight_is_never_written(name: str) -> None:
    x = np.random.RandomState(0).uniform(-1, 1, (64, 256)).astype(np.float32)
    q = encode(x, name)
    codes = np.stack([q.codes & 15, q.codes >> 4], -1).reshape(64, 16, 16)
    integers = q.codebooks == (0 if name == "mixfp4_makora" else 1)
    if name in ("mixfp4_twos_complement", "if4"):
        assert not (codes[integers] == 8).any()
    assert np.abs(q.decode()).max() <= 1.1


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_block_has_codes_scale_and_selector_zero(name: str) -> None:
    x = np.zeros((1, 32), dtype=np.float32)
    x[0, 16:] = 1.0
    q = encode(x, name)
    assert q.scales[0, 0] == 0 and not q.codes[0, :8].any()


def test_a_plain_nvfp4_reader_of_a_mixed_file_decodes_garbage() -> None:
    x = np.random.RandomState(0).standard_normal((16, 256)).astype(np.float32)
    q = encode(x, "mixfp4")
    misread = QuantizedTensor(get_format("nvfp4"), q.shape, q.codes, q.scales, q.global_scale).decode()
    assert np.mean((misread - x) ** 2) > 100 * np.mean((q.decode() - x) ** 2)
