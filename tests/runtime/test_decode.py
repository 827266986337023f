from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from halfbyte import encode, get_format, list_formats
from halfbyte.formats import BlockFormat, QuantizedTensor, scales
from halfbyte.runtime.decode import decode, to_torch
from halfbyte.runtime.remote import halfbyte_modules
from halfbyte.runtime.remote.halfbyte_modules import BYTE_SCALES, Decoder


def weight(*shape: int) -> np.ndarray:
    return (np.random.default_rng(5).standard_t(4, shape) * 0.02).astype(np.float32)


@pytest.mark.parametrize("name", list_formats())
@pytest.mark.parametrize("shape", [(128, 256), (2, 128, 128)], ids=["matrix", "stack"])
def test_torch_decodes_every_format_to_the_bits_that_numpy_decodes_it_to(name: str, shape: tuple[int, ...]) -> None:
    tensor = encode(weight(*shape), name, search="absmax")
    found = decode(tensor).numpy()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), tensor.format.decode(tensor).view(np.uint32))


@pytest.mark.parametrize("name", list_formats())
def test_all_codes_and_scale_bytes_decode_to_the_bits_that_numpy_decodes_them_to(name: str) -> None:
    fmt = get_format(name)
    rng = np.random.default_rng(1)
    arrays = {}
    for part, (kind, shape) in fmt.parts((256, 256)).items():
        integer = np.issubdtype(kind, np.integer)
        top = np.iinfo(kind).max if integer else 0
        arrays[part] = rng.integers(0, top, shape, kind, endpoint=True) if integer else weight(*shape).astype(kind)
    tensor = QuantizedTensor(fmt, (256, 256), **arrays)
    with np.errstate(over="ignore"):
        expected = fmt.decode(tensor)
    found = decode(tensor).numpy()
    # the sign of a NaN is nobody's business
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    same = ~np.isnan(expected)
    np.testing.assert_array_equal(found[same].view(np.uint32), expected[same].view(np.uint32))


@pytest.mark.parametrize("kind", [scales.E4M3, scales.E8M0, scales.E6M2], ids=lambda kind: kind.name)
def test_scale_bytes_mean_what_the_numpy_reference_says(kind: scales.ScaleType) -> None:
    codes = np.arange(256, dtype=np.uint8)[:255]
    ours = np.array([BYTE_SCALES[kind.name](int(code)) for code in codes], dtype=np.float32)
    np.testing.assert_array_equal(ours, kind.to_value(codes))


def test_a_decoded_weight_is_rounded_once_to_the_dtype_asked_for() -> None:
    tensor = encode(weight(32, 64), "nvfp4", search="absmax")
    found = decode(tensor, torch.bfloat16)
    expected = tensor.decode().astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found.view(torch.int16).numpy(), expected.view(np.int16))


def test_a_stored_reciprocal_of_the_tensor_scale_is_divided_by() -> None:
    tensor = encode(weight(32, 64), "nvfp4", search="absmax")
    assert tensor.global_scale is not None
    tensor.global_scale_inv = np.asarray(np.float32(1) / tensor.global_scale)
    np.testing.assert_array_equal(decode(tensor).numpy(), tensor.decode())


@pytest.mark.parametrize("name", ["nvfp4", "int4_asym_g64", "fp8_block128", "fp8_channel", "hif4"])
def test_a_matrix_decoded_in_chunks_equals_one_decoded_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = encode(weight(300, 128), name, search="absmax")
    parts = {"codes": to_torch(tensor.codes), "scales": to_torch(tensor.scales)}
    if tensor.global_scale is not None:
        parts["tensor_scale"] = to_torch(np.asarray(tensor.global_scale))
    if tensor.offsets is not None:
        parts["offsets"] = to_torch(tensor.offsets)
    monkeypatch.setattr(halfbyte_modules, "CHUNK", 128)
    found = halfbyte_modules._in_chunks(Decoder(get_format(name).describe()), parts, torch.float32)
    np.testing.assert_array_equal(found.numpy(), tensor.decode())


def test_every_block_format_s_scale_is_known_to_the_decoder() -> None:
    kinds = {f.scale.name for f in map(get_format, list_formats()) if isinstance(f, BlockFormat)}
    assert kinds <= BYTE_SCALES.keys() | {"bf16", "fp16", "fp32"}
