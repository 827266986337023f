"""Codes and scales into the order of a kernel's threads, and back byte for byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.gpu.weights import FORMATS, weight

from halfbyte.errors import FormatError
from halfbyte.formats import QuantizedTensor
from halfbyte.gpu.word_packing import pack_words, unpack_words
from halfbyte.kernels.linear import NoKernelError


def assert_same_bytes(first: QuantizedTensor, second: QuantizedTensor) -> None:
    assert first.shape == second.shape and first.format == second.format
    for name in ("codes", "scales", "global_scale", "global_scale_inv"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


@settings(max_examples=60)
@given(st.sampled_from(FORMATS), st.integers(1, 40), st.integers(1, 20), st.integers(0, 3), st.integers(0, 2**20))
def test_unpacking_gives_the_bytes_back(name: str, n: int, blocks: int, experts: int, seed: int) -> None:
    columns = max(weight(name, (1, 128)).format.block[1], 16)
    shape = (n, blocks * columns) if experts == 0 else (experts, n, blocks * columns)
    tensor = weight(name, shape, seed)
    assert_same_bytes(unpack_words(pack_words(tensor)), tensor)


def test_a_stored_reciprocal_of_the_global_scale_comes_back() -> None:
    tensor = weight("nvfp4", (16, 32))
    inverse = np.float32(1234.5)
    tensor = replace(tensor, global_scale_inv=np.asarray(inverse), global_scale=np.asarray(np.float32(1) / inverse))
    packed = pack_words(tensor)
    assert packed.factors == [np.float32(1) / inverse]
    assert_same_bytes(unpack_words(packed), tensor)


def test_a_code_that_no_encoder_writes_has_no_place() -> None:
    tensor = weight("if4", (16, 32))
    tensor.scales[:] |= 0x80
    tensor.codes[0, 0] = 8
    with pytest.raises(NoKernelError, match="uses the code 8"):
        pack_words(tensor)


def test_scales_of_another_shape_are_refused() -> None:
    tensor = weight("nvfp4", (16, 32))
    with pytest.raises(FormatError, match="scales of a nvfp4 weight"):
        pack_words(replace(tensor, scales=tensor.scales[:, :1]))


def test_packing_adds_no_bytes_to_whole_tiles_of_blocks_of_16() -> None:
    tensor = weight("mixfp4", (64, 256))
    packed = pack_words(tensor)
    assert packed.words.nbytes + packed.scales.nbytes == tensor.codes.nbytes + tensor.scales.nbytes
