"""Bytes on frozen inputs, equal to published digests and to what independent packages wrote."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from formats.streams import STREAMS, digests, fingerprints, frozen, golden, to_bf16
from halfbyte.formats import QuantizedTensor
from halfbyte.formats.packing import pack_nibbles, unpack_nibbles
from halfbyte.search import encode

FOUROVERSIX, TORCHAO, MLX = golden("fouroversix"), golden("torchao"), golden("mlx")
SEARCH = {
    "static_6": "absmax",
    "mse": "four_over_six",
    "mae": "four_over_six_mae",
    "abs_max": "four_over_six_absmax",
    "floor": "absmax",
    "rceil": "mx_rceil",
    "even": "mx_even",
    "two_level": "absmax",
}


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "search", "codes", "scales", "first", "s0", "mse"),
    [
        ("nvfp4", "absmax", "d6c4210a3b2fb342", "85820b57710892b1", "ffffffffeeeeeedd", 0x7E, 9.230201e-4),
        ("nvfp4", "four_over_six", "55bcff216ebf338e", "7cf47b6e6759b91a", "eeeeeededdddcdcc", 0x7C, 7.007946e-4),
        ("if4", "absmax", "a692c19118919b99", "0580b62ae7b623c6", "9999a9aaaabbcbcc", 0xFE, 3.803739e-4),
        ("mixfp4", "absmax", "f06ed025e76b6e9f", "935731fc6badec46", "ffffefeeeeddcdcc", 0xFC, 3.785621e-4),
    ],
)
def test_bytes_of_the_frozen_blocks(
    name: str, search: str, codes: str, scales: str, first: str, s0: int, mse: float
) -> None:
    x = frozen()
    q = encode(x, name, search)
    assert (sha(q.codes), sha(q.scales)) == (codes, scales)
    assert q.codes[0, :8].tobytes().hex() == first
    assert q.scales[0, 0] == s0
    assert ((q.decode().astype(np.float64) - x) ** 2).mean() == pytest.approx(mse, rel=1e-6)


def fouroversix_spelling(key: str) -> tuple[QuantizedTensor, np.ndarray]:
    """Our encoding of a case, and its codes as that package spells them."""
    name, rule, stream = key.split("/")
    x = STREAMS[stream]()
    if name == "nvint4":
        # 7 * 448 instead of 6 * 448 in the global scale, and two's complement
        q = encode(x, name, "absmax", global_scale=np.abs(x).max() / np.float32(3136))
        spelled = np.array([*range(8), *(-v & 15 for v in range(8))], dtype=np.uint8)
        return q, pack_nibbles(spelled[unpack_nibbles(q.codes)])
    q = encode(x, name, "absmax" if name == "if4" else SEARCH[rule])
    return q, q.codes


# one of 32,768 Gaussian blocks: the sums of magnitudes are added in another order
TIES = {"nvfp4/mae/gaussian"}
# all scales are equal; ties of BF16 inputs fall by the last bit of the reciprocal: 2 % and 0.5 % of the blocks
BF16_TIES = {"nvfp4/static_6/gaussian_bf16": 0.975, "if4/mse/gaussian_bf16": 0.99}


@pytest.mark.parametrize("key", [k for k in FOUROVERSIX if k not in TIES | BF16_TIES.keys()])
def test_bytes_equal_fouroversix(key: str) -> None:
    q, codes = fouroversix_spelling(key)
    assert digests(q.scales) == FOUROVERSIX[key]["scales"]
    assert digests(codes) == FOUROVERSIX[key]["codes"]


@pytest.mark.parametrize("key", BF16_TIES)
def test_scales_equal_fouroversix_and_codes_but_for_ties(key: str) -> None:
    q, codes = fouroversix_spelling(key)
    if key.startswith("nvfp4"):
        assert digests(q.scales) == FOUROVERSIX[key]["scales"]
    assert same_blocks(codes, q.scales, FOUROVERSIX[key]) > BF16_TIES[key]


def same_blocks(codes: np.ndarray, scales: np.ndarray, case: dict[str, Any]) -> float:
    ours = fingerprints(codes.reshape(-1, 8)[:2048], scales.reshape(-1)[:2048])
    theirs = bytes.fromhex(case["first_2048_blocks"])
    return float(np.mean(np.frombuffer(ours, np.uint8) == np.frombuffer(theirs, np.uint8)))


@pytest.mark.parametrize("key", [k for k in TORCHAO if "edges" not in k and k != "nvfp4/two_level/gaussian_bf16"])
def test_bytes_equal_torchao(key: str) -> None:
    name, rule, stream = key.split("/")
    q = encode(STREAMS[stream](), name, SEARCH[rule])
    assert digests(q.scales) == TORCHAO[key]["scales"]
    assert digests(q.codes) == TORCHAO[key]["codes"]


@pytest.mark.parametrize("key", [k for k in TORCHAO if "edges" in k])
def test_bytes_equal_torchao_on_edges_but_for_minus_zero_blocks(key: str) -> None:
    name, rule, stream = key.split("/")
    x = STREAMS[stream]()
    q = encode(x, name, SEARCH[rule])
    # a block of minus zeros keeps its signs there and is all zero codes here
    codes = q.codes.copy()
    codes[1] = {"mxfp4": 0x88, "mxfp8": 0x80}[name]
    assert digests(q.scales) == TORCHAO[key]["scales"]
    assert digests(codes) == TORCHAO[key]["codes"]


def test_nvfp4_of_bf16_weights_equals_torchao_but_for_ties() -> None:
    case = TORCHAO["nvfp4/two_level/gaussian_bf16"]
    q = encode(STREAMS["gaussian_bf16"](), "nvfp4", "absmax")
    assert digests(q.scales) == case["scales"]
    assert same_blocks(q.codes, q.scales, case) > 0.975


@pytest.mark.parametrize("key", [k for k in MLX if k.startswith("affine")])
def test_affine_scales_and_biases_equal_mlx_and_codes_fit_better(key: str) -> None:
    name, stream = key.split("/")
    x = to_bf16(STREAMS[stream]())
    q = encode(x, name, "absmax")
    assert q.offsets is not None
    assert digests(q.scales.astype(np.float32)) == MLX[key]["scales"]
    assert digests(q.offsets.astype(np.float32)) == MLX[key]["biases"]
    # MLX rounds to codes before it rounds scale and bias to BF16
    assert ((q.decode().astype(np.float64) - x) ** 2).mean() < MLX[key]["mse"]
