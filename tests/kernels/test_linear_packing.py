from __future__ import annotations

import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import FormatError
from halfbyte.formats import get_format
from halfbyte.kernels.linear import PackedLinear, PackedWeight
from kernels.linear_cases import PRODUCT_FORMATS, activations, columns, expected, miss, weight

PARTS = ("codes", "scales", "offsets", "global_scale", "global_scale_inv", "rotation")


@settings(max_examples=150)
@given(
    name=st.sampled_from(PRODUCT_FORMATS),
    lead=st.integers(0, 3),
    n=st.integers(1, 40),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_unpacking_gives_the_bytes_that_were_packed(name: str, lead: int, n: int, blocks: int, seed: int) -> None:
    block = get_format(name).block
    k = block[1] * blocks if block[0] == 1 and block[1] > 0 else 37 * blocks
    tensor = weight(name, (*((lead,) if lead else ()), n, k), seed)
    back = PackedWeight(tensor).unpack()
    assert back.format == tensor.format and back.shape == tensor.shape
    for part in PARTS:
        before, after = getattr(tensor, part), getattr(back, part)
        assert (before is None) == (after is None), part
        assert before is None or (before.dtype, before.shape, before.tobytes()) == (
            after.dtype,
            after.shape,
            after.tobytes(),
        )


@pytest.mark.slow
@settings(max_examples=60)
@given(n=st.integers(1, 70), k=st.integers(1, 300), batch=st.integers(1, 70), seed=st.integers(0, 99))
def test_products_of_any_shape(n: int, k: int, batch: int, seed: int) -> None:
    name = PRODUCT_FORMATS[seed % len(PRODUCT_FORMATS)]
    block = get_format(name).block
    k = k if block[0] != 1 or block[1] < 0 else -(-k // block[1]) * block[1]
    tensor, x = weight(name, (n, k), seed), activations(batch, k, seed)
    # of a single row what is left of large terms may be small
    scale = np.linalg.norm(x, axis=-1) * np.linalg.norm(tensor.decode())
    error = np.linalg.norm(PackedLinear(tensor)(x) - expected(x, tensor), axis=-1)
    assert (error <= 1e-6 * scale + 1e-30).all()


@pytest.mark.parametrize("name", ["mixfp4", "int4_g128", "affine4_g64", "fp8_channel", "hif4"])
def test_packed_weights_take_the_bytes_of_the_file(name: str) -> None:
    tensor = weight(name, (64, 256))
    assert PackedLinear(tensor).nbytes == tensor.nbytes


def test_packing_copies_what_it_needs() -> None:
    tensor, x = weight("mixfp4", (20, 64)), activations(2, 64)
    packed = PackedLinear(tensor)
    before = packed(x)
    for part in (tensor.codes, tensor.scales, tensor.global_scale):
        part[...] = 0
    assert packed(x).tobytes() == before.tobytes() and miss(before, before.astype(np.float64)) == 0


def test_packed_weights_are_not_pickled() -> None:
    with pytest.raises(TypeError, match=r"unpack\(\)"):
        pickle.dumps(PackedLinear(weight("nvfp4", (16, 64))))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", PRODUCT_FORMATS)
def test_rows_are_those_of_the_decoded_weight(name: str, dtype: type) -> None:
    tensor = weight(name, (150, columns(name, 3)))
    packed, decoded = PackedLinear(tensor), tensor.decode(dtype)
    for indices in (np.array([[149, 0], [17, 17]]), np.array(130), np.zeros(0, dtype=np.int64)):
        rows = packed.rows(indices, dtype)
        assert rows.dtype == dtype and rows.shape == (*indices.shape, tensor.shape[1])
        assert rows.tobytes() == decoded[indices].tobytes()


def test_rows_that_are_not_there_are_refused() -> None:
    packed = PackedLinear(weight("nvfp4", (16, 64)))
    for index in (16, -1):
        with pytest.raises(IndexError, match=f"no row {index}"):
            packed.rows(np.array([3, index]))
    with pytest.raises(FormatError, match="matrix"):
        PackedWeight(weight("nvfp4", (2, 16, 64))).rows(np.array([0]))
