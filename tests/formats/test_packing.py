from __future__ import annotations

import numpy as np

from halfbyte.formats.packing import pack_nibbles, unpack_nibbles


def test_the_even_element_lies_in_the_low_nibble() -> None:
    assert pack_nibbles(np.arange(16, dtype=np.uint8)).tobytes().hex() == "1032547698badcfe"


def test_eight_codes_read_as_a_little_endian_word_start_at_its_low_end() -> None:
    # compressed-tensors' int32 and MLX's uint32 words
    assert pack_nibbles(np.arange(8, dtype=np.uint8)).view("<u4").tolist() == [0x76543210]


def test_unpacking_undoes_packing_for_every_byte() -> None:
    packed = np.arange(256, dtype=np.uint8).reshape(2, 128)
    codes = unpack_nibbles(packed)
    assert codes.shape == (2, 256) and codes.max() == 15
    assert np.array_equal(pack_nibbles(codes), packed)


def test_leading_dimensions_stay() -> None:
    codes = np.random.RandomState(0).randint(0, 16, (2, 3, 4, 32)).astype(np.uint8)
    assert np.array_equal(unpack_nibbles(pack_nibbles(codes)), codes)
