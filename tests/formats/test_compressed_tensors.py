"""Our arrays through compressed-tensors' own decompression, and its compression of the same weights."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from halfbyte.formats import QuantizedTensor
from halfbyte.search import SEARCHES, encode

from .streams import to_bf16

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # noqa: E402
from compressed_tensors.quantization import preset_name_to_scheme  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam  # noqa: E402

FP8_CODES = torch.float8_e4m3fn


def weight(seed: int = 0) -> np.ndarray:
    return (np.random.RandomState(seed).standard_normal((256, 512)) * 0.02).astype(np.float32)


def scheme(preset: str, group: int | None = None) -> Any:
    found = preset_name_to_scheme(preset, ["Linear"])
    if group:
        found.weights.group_size = group
    return found


def decompress(container: str, how: Any, **state: Any) -> np.ndarray:
    found = BaseCompressor.get_value_from_registry(container).decompress(state, how)["weight"]
    return found.float().numpy()


def bf16_scales(q: QuantizedTensor) -> Any:
    return torch.from_numpy(q.scales.astype(np.float32))


def int32_words(q: QuantizedTensor) -> Any:
    return torch.from_numpy(q.codes.view(np.int32).copy())


@pytest.mark.parametrize("search", ["absmax", "four_over_six", "sweep"])
def test_nvfp4_decompresses_to_our_values_in_bf16(search: str) -> None:
    q = encode(weight(), "nvfp4", search)
    assert q.global_scale is not None
    q.global_scale_inv = np.float32(1) / q.global_scale
    values = decompress(
        "nvfp4-pack-quantized",
        scheme("NVFP4A16"),
        weight_packed=torch.from_numpy(q.codes),
        weight_scale=torch.from_numpy(q.scales).view(FP8_CODES),
        weight_global_scale=torch.from_numpy(q.global_scale_inv.reshape(1)),
    )
    assert np.array_equal(values, q.decode().astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("search", [s for s in SEARCHES if s.startswith("mx_")] + ["absmax", "sweep"])
def test_mxfp4_decompresses_to_our_values(search: str) -> None:
    q = encode(weight(), "mxfp4", search)
    packed, scales = torch.from_numpy(q.codes), torch.from_numpy(q.scales)
    values = decompress("mxfp4-pack-quantized", scheme("MXFP4A16"), weight_packed=packed, weight_scale=scales)
    assert np.array_equal(values, q.decode())


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_symmetric_int4_decompresses_to_our_values(group: int) -> None:
    q = encode(weight(), f"int4_g{group}")
    shape = torch.tensor(q.shape)
    state = {"weight_packed": int32_words(q), "weight_scale": bf16_scales(q), "weight_shape": shape}
    assert np.array_equal(decompress("pack-quantized", scheme("W4A16", group), **state), q.decode())


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_asymmetric_int4_decompresses_to_our_values(group: int) -> None:
    q = encode(weight(), f"int4_asym_g{group}")
    assert q.offsets is not None
    zero = pack_to_int32(torch.from_numpy(q.offsets.astype(np.int8) - 8), 4, packed_dim=0)
    state = {"weight_packed": int32_words(q), "weight_scale": bf16_scales(q), "weight_shape": torch.tensor(q.shape)}
    values = decompress("pack-quantized", scheme("W4A16_ASYM", group), weight_zero_point=zero, **state)
    assert np.array_equal(values, q.decode())


@pytest.mark.parametrize(
    ("name", "preset"), [("fp8_tensor", "FP8"), ("fp8_channel", "FP8_DYNAMIC"), ("fp8_block128", "FP8_BLOCK")]
)
def test_fp8_decompresses_to_our_values(name: str, preset: str) -> None:
    q = encode(weight(), name)
    scales = bf16_scales(q).reshape(1) if name == "fp8_tensor" else bf16_scales(q)
    codes = torch.from_numpy(q.codes).view(FP8_CODES)
    assert np.array_equal(decompress("float-quantized", scheme(preset), weight=codes, weight_scale=scales), q.decode())


def test_mxfp8_decompresses_to_our_values() -> None:
    q = encode(weight(), "mxfp8")
    codes = torch.from_numpy(q.codes).view(FP8_CODES)
    values = decompress("mxfp8-quantized", scheme("MXFP8A16"), weight=codes, weight_scale=torch.from_numpy(q.scales))
    assert np.array_equal(values, q.decode())


def compress(x: np.ndarray, container: str, preset: str) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Bytes, scales (E4M3/E8M0 bytes or BF16) and global scale by compressed-tensors' own rules."""
    how, t = scheme(preset), torch.from_numpy(x)
    args = how.weights
    groups = t.reshape(len(x), -1, args.group_size or x.shape[1])
    global_scale_inv = generate_gparam(t.min(), t.max()) if "nvfp4" in container else None
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale_inv)
    if args.scale_dtype is None:
        scale = scale.bfloat16().float()
    state = {"weight": t, "weight_scale": scale}
    if global_scale_inv is not None:
        state["weight_global_scale"] = global_scale_inv.reshape(1)
    if not args.symmetric:
        state["weight_zero_point"] = zero
    found = BaseCompressor.get_value_from_registry(container).compress(state, how)
    codes = found.get("weight_packed", found.get("weight")).view(torch.uint8).numpy()
    scale = found["weight_scale"]
    stored = scale.float().numpy() if args.scale_dtype is None else scale.view(torch.uint8).numpy()
    return codes, stored, None if global_scale_inv is None else 1 / float(global_scale_inv)


@pytest.mark.parametrize("source", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "search", "container", "preset", "share"),
    [
        ("nvfp4", "absmax", "nvfp4-pack-quantized", "NVFP4A16", 1.0),
        ("mxfp4", "mx_even", "mxfp4-pack-quantized", "MXFP4A16", 1.0),
        ("fp8_channel", "absmax", "float-quantized", "FP8_DYNAMIC", 1.0),
        # it divides by the scale, we multiply by the reciprocal: ties of BF16 weights may fall the other way
        ("int4_g128", "absmax", "pack-quantized", "W4A16", 0.9995),
        # it finds the zero point before it rounds the scale to BF16: another one in a hundredth of the groups
        ("int4_asym_g128", "absmax", "pack-quantized", "W4A16_ASYM", 0.98),
        # its threshold is 1.75 also for 8 bit, as for FP4: blocks whose amax is 1.75 * 2**k get a larger scale
        ("mxfp8", "mx_rceil", "mxfp8-quantized", "MXFP8A16", 0.99),
    ],
)
def test_bytes_equal_those_of_compressed_tensors(
    source: str, name: str, search: str, container: str, preset: str, share: float
) -> None:
    x = weight() if source == "fp32" else to_bf16(weight())
    codes, scales, global_scale = compress(x, container, preset)
    q = encode(x, name, search, **({} if global_scale is None else {"global_scale": global_scale}))
    ours = q.scales if q.scales.dtype == np.uint8 else q.scales.astype(np.float32)
    assert np.mean(ours == scales.reshape(q.scales.shape)) >= share
    assert np.mean(q.codes == codes.reshape(q.codes.shape)) >= share
