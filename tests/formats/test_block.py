from __future__ import annotations

import numpy as np
import pytest

from halfbyte.formats import BlockFormat, QuantizedTensor, get_format
from halfbyte.formats.packing import unpack_nibbles

from .cases import FORMATS, shape_for
from .streams import random_bytes

BLOCK_FORMATS = [n for n in FORMATS if isinstance(get_format(n), BlockFormat)]
BITS_PER_WEIGHT = {
    "nvfp4": 4.5,
    "nvint4": 4.5,
    "mixfp4": 4.5,
    "if4": 4.5,
    "razer": 4.5,
    "razer_e3m3": 4.5,
    "iq4_nl": 4.5,
    "nf4": 4.5,
    "mxfp4": 4.25,
    "mxfp8": 8.25,
    "int4_g16": 5.0,
    "int4_g32": 4.5,
    "int4_g64": 4.25,
    "int4_g128": 4.125,
    "int4_asym_g32": 4.75,
    "affine4_g64": 4.5,
    "affine8_g64": 8.5,
    "hif4": 4.5,
}


def random_tensor(fmt: BlockFormat, shape: tuple[int, ...], global_scale_inv: bool = False) -> QuantizedTensor:
    """Any codes with scales that are neither zero nor NaN."""
    parts = fmt.parts(shape)
    codes = random_bytes(parts["codes"][1], 1)
    if fmt.bits == 8:
        codes[(codes & 127) == 127] = 0
    stored = random_bytes(parts["scales"][1], 2, fmt.scale.low + 60, max(fmt.scale.high - 60, 62))
    if len(fmt.codebooks) > 1:
        stored = (stored | random_bytes(stored.shape, 3, 0, len(fmt.codebooks)) << fmt.scale.bits).astype(np.uint8)
    if not fmt.scale.ordered:
        stored = (stored.astype(np.float32) / 97).astype(fmt.scale.dtype)
    global_scale = np.full(shape[:-2], 0.37, dtype=np.float32) if fmt.has_global_scale else None
    given = np.full(shape[:-2], 2.7, dtype=np.float32) if global_scale_inv else None
    return QuantizedTensor(fmt, shape, codes, stored, global_scale, None, given)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_decoding_follows_the_definition_element_by_element(name: str) -> None:
    fmt = get_format(name)
    assert isinstance(fmt, BlockFormat)
    shape = shape_for(fmt)
    q = random_tensor(fmt, shape)
    codes = unpack_nibbles(q.codes) if fmt.bits == 4 else q.codes
    rows, columns = (n if n > 0 else 1 << 30 for n in fmt.block_shape)
    decoded = q.decode()
    for i in range(0, shape[0], max(1, shape[0] // 3)):
        for j in range(shape[1]):
            stored = q.scales[i // rows, j // columns]
            codebook = 0
            if len(fmt.codebooks) > 1:
                codebook, stored = int(stored) >> fmt.scale.bits, stored & ((1 << fmt.scale.bits) - 1)
            scale = fmt.scale.to_value(np.array([stored], dtype=fmt.scale.dtype))[0]
            if q.global_scale is not None:
                scale = scale * q.global_scale[()]
            assert decoded[i, j] == fmt.codebooks[codebook].array[codes[i, j]] * scale


@pytest.mark.parametrize("name", ["nvfp4", "mixfp4"])
def test_a_stored_divisor_divides_the_scales(name: str) -> None:
    fmt = get_format(name)
    assert isinstance(fmt, BlockFormat)
    q = random_tensor(fmt, (2, 3, 64), global_scale_inv=True)
    codes = unpack_nibbles(q.codes)
    values = np.stack([t.array for t in fmt.codebooks])[np.repeat(q.codebooks, 16, -1), codes]
    scales = np.repeat(fmt.split_scales(q.scales)[0] / np.float32(2.7), 16, -1)
    assert np.array_equal(q.decode(), values * scales)


@pytest.mark.parametrize("name", BITS_PER_WEIGHT)
def test_bits_per_weight(name: str) -> None:
    shape = (64, 4096)
    parts = get_format(name).parts(shape)
    stored = get_format(name).nbytes(shape) - (4 if "global_scale" in parts else 0)
    assert stored * 8 / (64 * 4096) == BITS_PER_WEIGHT[name]


def test_a_vector_has_blocks_and_one_tensor_scale() -> None:
    fmt = get_format("nvfp4")
    assert fmt.parts((64,)) == {
        "codes": (np.uint8, (32,)),
        "scales": (np.uint8, (4,)),
        "global_scale": (np.float32, ()),
    }


def test_tiles_may_be_cut_at_both_edges() -> None:
    fmt = get_format("fp8_block128")
    assert fmt.parts((2, 130, 300))["scales"][1] == (2, 2, 3)
    assert fmt.problem((130, 300)) is None


def test_one_scale_per_tensor_and_per_channel() -> None:
    assert get_format("fp8_tensor").parts((5, 30, 40))["scales"][1] == (5, 1, 1)
    assert get_format("fp8_channel").parts((5, 30, 40))["scales"][1] == (5, 30, 1)


def test_a_block_reaches_its_largest_value_times_its_scale() -> None:
    fmt = get_format("mixfp4")
    scales = np.array([[0x40, 0xC0, 0x30]], np.uint8)  # 2, 2 with the selector bit, 0.5
    q = QuantizedTensor(fmt, (1, 48), np.zeros((1, 24), np.uint8), scales, np.float32(0.5))
    assert fmt.block_reach(q).tolist() == [[6, 7, 1.5]]
