from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from halfbyte.formats import AffineFormat, QuantizedTensor, get_format, list_formats
from halfbyte.formats.affine import solve_range

AFFINE = [n for n in list_formats() if isinstance(get_format(n), AffineFormat)]


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes one after the other from the lowest bit on, through Python's whole numbers."""
    rows = [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in codes]
    width = codes.shape[1] * bits // 8
    return np.array([list(row.to_bytes(width, "little")) for row in rows], dtype=np.uint8)


def tensor(name: str) -> tuple[QuantizedTensor, np.ndarray]:
    """A random tensor and its unpacked codes."""
    fmt = get_format(name)
    assert isinstance(fmt, AffineFormat)
    r, shape = np.random.RandomState(0), (3, fmt.group * 2)
    codes = r.randint(0, fmt.levels + 1, shape).astype(np.uint8)
    packed = bit_stream(codes, fmt.bits)
    scales = r.uniform(0.1, 1, (3, 2)).astype(ml_dtypes.bfloat16)
    biases = r.standard_normal((3, 2)).astype(ml_dtypes.bfloat16)
    zeros = r.randint(0, 16, (3, 2)).astype(np.uint8)
    return QuantizedTensor(fmt, shape, packed, scales, None, biases if fmt.offset == "bias" else zeros), codes


@pytest.mark.parametrize("name", AFFINE)
def test_decoding_follows_the_definition_element_by_element(name: str) -> None:
    q, codes = tensor(name)
    assert isinstance(q.format, AffineFormat) and q.offsets is not None
    decoded = q.decode()
    for i in range(3):
        for j in range(q.shape[1]):
            g = j // q.format.group
            code, scale, offset = (np.float32(v) for v in (codes[i, j], q.scales[i, g], q.offsets[i, g]))
            expected = code * scale + offset if q.format.offset == "bias" else (code - offset) * scale
            assert decoded[i, j] == expected


@pytest.mark.parametrize("name", AFFINE)
def test_declared_arrays(name: str) -> None:
    q, _ = tensor(name)
    parts = q.format.parts(q.shape)
    assert q.offsets is not None
    assert parts["codes"] == (q.codes.dtype, q.codes.shape)
    assert parts["scales"] == (q.scales.dtype, q.scales.shape)
    assert parts["offsets"] == (q.offsets.dtype, q.offsets.shape)
    assert q.nbytes == q.format.nbytes(q.shape)


def test_one_table_is_reported_for_affine_formats() -> None:
    q, _ = tensor("affine4_g64")
    assert q.codebooks.shape == q.scales.shape and not q.codebooks.any()


@pytest.mark.parametrize("name", AFFINE)
def test_the_range_of_a_group_ends_at_its_lowest_and_highest_code(name: str) -> None:
    q, _ = tensor(name)
    assert isinstance(q.format, AffineFormat)
    lowest, highest = (replace(q, codes=np.full_like(q.codes, byte)).decode() for byte in (0, 255))
    first, last = q.format.value_range(q)
    assert np.array_equal(first, lowest) and np.array_equal(last, highest)


@pytest.mark.parametrize("name", ["affine4_g64", "int4_asym_g32"])
def test_a_group_of_zeros_has_no_offset(name: str) -> None:
    fmt, zero = get_format(name), np.zeros(1, np.float32)
    assert isinstance(fmt, AffineFormat)
    step, offset = solve_range(zero, zero, fmt)
    assert np.abs(step) > 0 and offset == 0


def test_mlx_meets_the_end_of_larger_magnitude_exactly() -> None:
    fmt = get_format("affine4_g64")
    assert isinstance(fmt, AffineFormat)
    low, high = np.array([-8, -7], np.float32), np.array([7, 8], np.float32)
    step, offset = solve_range(low, high, fmt)
    assert (step.tolist(), offset.tolist()) == ([1, -1], [-8, 8])
