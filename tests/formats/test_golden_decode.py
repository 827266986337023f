"""Stored bytes of independent packages decode to exactly the values those packages gave."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.formats import QuantizedTensor, get_format
from halfbyte.formats.packing import pack_nibbles
from halfbyte.formats.signed import IQ4_NL_CODEBOOK

from .streams import digests, golden, random_bytes


def decode(name: str, codes: np.ndarray, scales: np.ndarray, global_scale: float | None = None) -> np.ndarray:
    fmt = get_format(name)
    shape = (len(codes), codes.shape[1] * (1 if name == "mxfp8" else 2))
    scale = None if global_scale is None else np.float32(global_scale)
    return QuantizedTensor(fmt, shape, codes, scales, scale).decode()


@pytest.mark.parametrize(("mode", "low", "high"), [("mxfp4", 20, 220), ("nvfp4", 0, 127), ("mxfp8", 20, 220)])
def test_random_bytes_decode_as_in_mlx(mode: str, low: int, high: int) -> None:
    codes = random_bytes((64, 512), 10)
    if mode == "mxfp8":
        codes[(codes & 127) == 127] = 0
    group = {"mxfp4": 32, "nvfp4": 16, "mxfp8": 32}[mode]
    width = 512 if mode == "mxfp8" else 1024
    scales = random_bytes((64, width // group), 11, low, high)
    values = decode(mode, codes, scales, 1.0 if mode == "nvfp4" else None)
    assert digests(values) == golden("mlx")[f"{mode}/decode"]["values"]


def half_split(block_bytes: np.ndarray, size: int) -> np.ndarray:
    """llama.cpp's nibbles (low: first half of a block, high: second half) as even/odd pairs [rows, K/2]."""
    b = block_bytes.reshape(len(block_bytes), -1, size // 2)
    return pack_nibbles(np.concatenate([b & 15, b >> 4], -1).reshape(len(b), -1))


def test_random_bytes_decode_as_in_gguf_mxfp4() -> None:
    blocks = random_bytes((64, 8, 17), 12)
    values = decode("mxfp4", half_split(blocks[..., 1:], 32), random_bytes((64, 8), 13, 20, 220))
    assert digests(values + np.float32(0)) == golden("gguf")["mxfp4/decode"]["values"]


def test_random_bytes_decode_as_in_gguf_nvfp4() -> None:
    blocks, scales = random_bytes((64, 4, 36), 14), random_bytes((64, 4, 4), 15, 0, 127)
    values = decode("nvfp4", half_split(blocks[..., 4:], 16), scales.reshape(64, 16), 1.0)
    assert digests(values + np.float32(0)) == golden("gguf")["nvfp4/decode"]["values"]


def test_iq4_nl_is_the_table_of_gguf() -> None:
    assert list(IQ4_NL_CODEBOOK.values) == golden("gguf")["iq4_nl/table"]["values"]
