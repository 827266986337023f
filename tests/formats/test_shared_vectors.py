"""Real weights and an edge matrix, encoded by seven libraries: what they stored decodes to what they recorded.

Our encoders give the same bytes where a rule is the same; each exception says why. torchao's fourth rule, ceil of
log2(amax) whatever the grid, is only read: no engine writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from halfbyte.formats import QuantizedTensor, get_format
from halfbyte.formats.packing import pack_nibbles
from halfbyte.search import encode

INPUTS = (
    "gpt2_h11_attn_c_proj_T",
    "gpt2_h1_attn_c_proj_T",
    "whisper_l0_k_proj",
    "whisper_l3_fc1",
    "qwen36_35b_embed",
    "qwen36_35b_act_l3",
    "edge",
)
REAL = INPUTS[:-1]
TINY_ROW = 10  # of ``edge``: one element of 2**-126, where libraries flush or overflow
on_all = pytest.mark.parametrize("name", INPUTS)
on_real = pytest.mark.parametrize("name", REAL)


@pytest.fixture(scope="module")
def vectors(shared: Path) -> Any:
    return np.load(shared / "data" / "golden" / "fp4_vectors.npz")


def decode(fmt: str, shape: tuple[int, ...], codes: Any, scales: Any, **more: Any) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return QuantizedTensor(get_format(fmt), shape, codes, scales, **more).decode()


def same(ours: np.ndarray, theirs: np.ndarray, name: str) -> bool:
    """Equal values; ``edge`` without the row where scales leave the range of FP32."""
    if name == "edge":
        ours, theirs = (np.delete(a, TINY_ROW, axis=0) for a in (ours, theirs))
    return np.array_equal(ours, theirs)


@on_all
@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
def test_torchao_mxfp4_decodes_to_the_recorded_values(vectors: Any, name: str, rule: str) -> None:
    x, key = vectors[f"{name}/input"], f"{name}/torchao_mxfp4_{rule}"
    values = decode("mxfp4", x.shape, vectors[f"{key}/packed"], vectors[f"{key}/scale_e8m0"])
    assert np.array_equal(values, vectors[f"{key}/dequant"])


@on_all
@pytest.mark.parametrize("level", ["one", "two"])
def test_torchao_nvfp4_decodes_to_the_recorded_values(vectors: Any, name: str, level: str) -> None:
    x, key = vectors[f"{name}/input"], f"{name}/torchao_nvfp4_{level}_level"
    scale = vectors[f"{key}/per_tensor_scale"][0] if level == "two" else np.float32(1)
    values = decode("nvfp4", x.shape, vectors[f"{key}/packed"], vectors[f"{key}/scale_e4m3"], global_scale=scale)
    assert np.array_equal(values, vectors[f"{key}/dequant"])


@on_all
def test_compressed_tensors_nvfp4_decodes_to_the_recorded_bf16_values(vectors: Any, name: str) -> None:
    x, key = vectors[f"{name}/input"], f"{name}/ct_nvfp4"
    global_scale_inv = vectors[f"{key}/weight_global_scale"][0]
    codes, scales = vectors[f"{key}/weight_packed"], vectors[f"{key}/weight_scale_e4m3"]
    values = decode("nvfp4", x.shape, codes, scales, global_scale_inv=global_scale_inv)
    assert np.array_equal(values.astype(ml_dtypes.bfloat16).astype(np.float32), vectors[f"{key}/dequant"])


@on_all
def test_compressed_tensors_mxfp4_decodes_to_the_recorded_values(vectors: Any, name: str) -> None:
    x, key = vectors[f"{name}/input"], f"{name}/ct_mxfp4"
    values = decode("mxfp4", x.shape, vectors[f"{key}/weight_packed"], vectors[f"{key}/weight_scale"])
    assert np.array_equal(values, vectors[f"{key}/dequant"])


@on_all
@pytest.mark.parametrize(
    ("mode", "fmt"), [("mxfp4_b4_g32", "mxfp4"), ("nvfp4_b4_g16", "nvfp4"), ("mxfp8_b8_g32", "mxfp8")]
)
def test_mlx_words_decode_to_the_recorded_values(vectors: Any, name: str, mode: str, fmt: str) -> None:
    x, key = vectors[f"{name}/input"], f"{name}/mlx_{mode}"
    scale = np.float32(1) if fmt == "nvfp4" else None
    words = vectors[f"{key}/w_q"].view(np.uint8)
    values = decode(fmt, x.shape, words, vectors[f"{key}/scales"], global_scale=scale)
    assert same(values, vectors[f"{key}/dequant"], name)


@on_all
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 64)])
def test_mlx_affine_words_decode_to_the_recorded_values(vectors: Any, name: str, bits: int, group: int) -> None:
    x, key = vectors[f"{name}/input"], f"{name}/mlx_affine_b{bits}_g{group}"
    if f"{key}/w_q" not in vectors:
        assert x.shape[-1] % group  # edge has 32 columns
        return
    words, scales = vectors[f"{key}/w_q"].view(np.uint8), vectors[f"{key}/scales"]
    values = decode(f"affine{bits}_g{group}", x.shape, words, scales, offsets=vectors[f"{key}/biases"])
    assert np.array_equal(values, vectors[f"{key}/dequant"])


def gguf_mxfp4(vectors: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Even/odd nibbles and scales of llama.cpp's blocks of 17 bytes (nibbles split in halves of the block)."""
    raw = vectors[f"{name}/gguf_MXFP4/bytes"]
    blocks = raw.reshape(len(raw), -1, 17)
    low, high = blocks[..., 1:] & 15, blocks[..., 1:] >> 4
    return pack_nibbles(np.concatenate([low, high], -1).reshape(len(raw), -1)), blocks[..., 0]


@on_all
def test_gguf_mxfp4_blocks_decode_to_the_recorded_values(vectors: Any, name: str) -> None:
    codes, scales = gguf_mxfp4(vectors, name)
    values = decode("mxfp4", vectors[f"{name}/input"].shape, codes, scales)
    assert same(values, vectors[f"{name}/gguf_MXFP4/dequant"], name)


def test_all_nvfp4_bytes_of_gguf_decode_to_the_recorded_values(vectors: Any) -> None:
    blocks = vectors["gguf_NVFP4_random/bytes"]
    nibbles = blocks[:, 4:].reshape(-1, 4, 8)
    codes = pack_nibbles(np.concatenate([nibbles & 15, nibbles >> 4], -1).reshape(-1, 64))
    # llama.cpp strips the sign of a scale and reads 0x7F as zero
    scales = np.where(blocks[:, :4] & 127 == 127, 0, blocks[:, :4] & 127).astype(np.uint8)
    values = decode("nvfp4", (64, 64), codes, scales, global_scale=np.float32(1))
    assert np.array_equal(values, vectors["gguf_NVFP4_random/dequant"])


@on_real
@pytest.mark.parametrize(("rule", "search"), [("floor", "absmax"), ("even", "mx_even"), ("rceil", "mx_rceil")])
def test_mxfp4_bytes_equal_torchao(vectors: Any, name: str, rule: str, search: str) -> None:
    q, key = encode(vectors[f"{name}/input"], "mxfp4", search), f"{name}/torchao_mxfp4_{rule}"
    assert np.array_equal(q.scales, vectors[f"{key}/scale_e8m0"])
    assert np.array_equal(q.codes, vectors[f"{key}/packed"])


@pytest.mark.parametrize(("rule", "search"), [("floor", "absmax"), ("even", "mx_even"), ("rceil", "mx_rceil")])
def test_mxfp4_values_equal_torchao_on_the_edge_matrix(vectors: Any, rule: str, search: str) -> None:
    # torch flushes the subnormal scale 2**-127 of the tiny row; minus zeros of a zero block become plus zeros here
    q, key = encode(vectors["edge/input"], "mxfp4", search), f"edge/torchao_mxfp4_{rule}"
    assert np.array_equal(q.scales, vectors[f"{key}/scale_e8m0"])
    assert same(q.decode(), vectors[f"{key}/dequant"], "edge")


@on_all
def test_mxfp4_bytes_equal_compressed_tensors(vectors: Any, name: str) -> None:
    q, key = encode(vectors[f"{name}/input"], "mxfp4", "mx_even"), f"{name}/ct_mxfp4"
    assert np.array_equal(q.scales, vectors[f"{key}/weight_scale"])
    assert np.array_equal(q.codes, vectors[f"{key}/weight_packed"])


@on_all
def test_mxfp4_even_values_equal_microxcaling(vectors: Any, name: str) -> None:
    q = encode(vectors[f"{name}/input"], "mxfp4", "absmax")
    assert np.array_equal(q.decode(), vectors[f"{name}/microxcaling_mxfp4_even/dequant"])


@on_real
def test_mxfp8_bytes_equal_mlx(vectors: Any, name: str) -> None:
    q, key = encode(vectors[f"{name}/input"], "mxfp8", "mx_rceil"), f"{name}/mlx_mxfp8_b8_g32"
    assert np.array_equal(q.scales, vectors[f"{key}/scales"])
    assert np.array_equal(q.codes, vectors[f"{key}/w_q"].view(np.uint8))


@on_real
@pytest.mark.parametrize(("library", "search"), [("mlx_mxfp4_b4_g32", "mx_rceil"), ("gguf_MXFP4", "absmax")])
def test_mxfp4_values_equal_mlx_and_gguf_but_for_ties(vectors: Any, name: str, library: str, search: str) -> None:
    # both send exact ties to the smaller magnitude, we to the even code; ties are common only in BF16 inputs
    q, theirs = encode(vectors[f"{name}/input"], "mxfp4", search), vectors[f"{name}/{library}/dequant"]
    different = q.decode() != theirs
    assert different.mean() < 0.004
    x = vectors[f"{name}/input"].astype(np.float64)
    assert np.array_equal(np.abs(q.decode() - x)[different], np.abs(theirs - x)[different])


@on_real
def test_nvfp4_bytes_equal_torchao_with_its_tensor_scale(vectors: Any, name: str) -> None:
    q, key = encode(vectors[f"{name}/input"], "nvfp4", "absmax"), f"{name}/torchao_nvfp4_two_level"
    assert q.global_scale == vectors[f"{key}/per_tensor_scale"][0]
    assert np.array_equal(q.scales, vectors[f"{key}/scale_e4m3"])
    assert np.array_equal(q.codes, vectors[f"{key}/packed"])


@on_real
def test_nvfp4_bytes_equal_compressed_tensors_but_for_ties(vectors: Any, name: str) -> None:
    # its global scale is a divisor; 0.17 % of the bytes of one BF16 input hold ties that fall the other way
    x, key = vectors[f"{name}/input"], f"{name}/ct_nvfp4"
    q = encode(x, "nvfp4", "absmax", global_scale=1 / vectors[f"{key}/weight_global_scale"][0])
    assert np.array_equal(q.scales, vectors[f"{key}/weight_scale_e4m3"])
    assert np.mean(q.codes == vectors[f"{key}/weight_packed"]) > 0.998


def test_small_float_rounding_equals_ml_dtypes_on_all_ties(shared: Path) -> None:
    from halfbyte.formats.codebooks import E2M1, E4M3

    grids = np.load(shared / "data" / "golden" / "decode_tables_ml_dtypes.npz")
    assert np.array_equal(E2M1.array, grids["decode_float4_e2m1fn"])
    finite = np.isfinite(grids["encode_grid"])
    assert np.array_equal(E2M1.encode(grids["encode_grid"])[finite], grids["encode_float4_e2m1fn"][finite])
    z = grids["encode_grid_e4m3"]
    # torch saturates as E4M3 codes here do; ml_dtypes gives NaN above 464
    assert np.array_equal(E4M3.encode(z), grids["encode_float8_e4m3fn_torch"])
