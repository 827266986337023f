"""How each engine reads a checkpoint: its own library where there is one, else its published layout in a few lines.

A judge gets the stored tensors and config.json, and gives the dense values of each quantized module under the name
that the engine has for it. None of them uses halfbyte's formats, packing or dialects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from dialects.library import decompress, to_torch

Array = NDArray[Any]
F32 = np.float32


class Stored(NamedTuple):
    """A checkpoint as it lies in its folder."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Array]
    dtypes: Mapping[str, str]


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)
INT4_SIGNED = np.array([*range(8), *(-c for c in range(8))], F32)


def nibbles(array: Array) -> Array:
    """Two codes a byte, the first in the low half."""
    return np.stack([array & 15, array >> 4], axis=-1).reshape(*array.shape[:-1], -1)


def bits_of(array: Array, bits: int) -> Array:
    """Codes of any width, the first in the lowest bits."""
    flat = np.unpackbits(array, axis=-1, bitorder="little").reshape(*array.shape[:-1], -1, bits)
    return np.packbits(flat, axis=-1, bitorder="little")[..., 0]


def e4m3(array: Array) -> Array:
    return array.view(ml_dtypes.float8_e4m3fn).astype(F32)


def e8m0(array: Array) -> Array:
    return array.view(ml_dtypes.float8_e8m0fnu).astype(F32)


def small_float(code: Array, mantissa: int, bias: int) -> Array:
    """A float without sign, infinity and NaN, by its definition."""
    field, low = code.astype(np.int64) >> mantissa, code & ((1 << mantissa) - 1)
    whole = np.where(field > 0, 1 + low / 2.0**mantissa, low / 2.0**mantissa)
    return (whole * 2.0 ** (np.maximum(field, 1) - bias)).astype(F32)


def over_columns(scales: Array, k: int) -> Array:
    """A scale per block of columns, over all columns."""
    return np.repeat(scales, k // scales.shape[-1], axis=-1)


def over_squares(scales: Array, shape: tuple[int, ...], side: int = 128) -> Array:
    """A scale per square, over a matrix whose last squares may be cut."""
    return scales.repeat(side, -1).repeat(side, -2)[..., : shape[-2], : shape[-1]]


def halfbyte(stored: Stored) -> dict[str, Array]:
    """By what the configuration states of each format, and the arrays beside each other."""
    settings, found = stored.config["quantization_config"], {}
    for name, codes in stored.tensors.items():
        weight = name.removesuffix("_codes")
        if weight == name:
            continue
        (fmt,) = [f for f, patterns in settings["weights"].items() if any(re.match(p[3:], weight) for p in patterns)]
        told = settings["formats"][fmt]
        parts = {p: stored.tensors.get(f"{weight}_{p}") for p in ("scales", "tensor_scale", "offsets")}
        found[weight] = _stated(told, codes, **parts)
        if "rotation" in told:
            size, swaps = told["rotation"]["size"], stored.tensors.get(f"{weight}_rotation")
            found[weight] = turned_back(found[weight], size, swaps)
    return found


def turned_back(values: Array, size: int, swaps: Array | None = None) -> Array:
    """Blocks of columns times the Hadamard matrix or, from the last step on, times it and with channels swapped."""
    blocks = values.reshape(*values.shape[:-1], -1, size).copy()
    if swaps is None:
        return hadamard(blocks).reshape(values.shape)
    for place in np.ndindex(swaps.shape[:-1]):
        at = (*place[:-1], slice(None), place[-1])
        for channel in (int(c) for c in swaps[place][::-1] if c < size):
            block = hadamard(blocks[at])
            block[:, [0, channel]] = block[:, [channel, 0]]
            blocks[at] = block
    return blocks.reshape(values.shape)


def hadamard(blocks: Array) -> Array:
    """Sums and differences over distances 1, 2, 4 ..., then the FP32 number next to one over the root of the size."""
    size = blocks.shape[-1]
    distance = 1
    while distance < size:
        first = [i for i in range(size) if not i & distance]
        second = [i + distance for i in first]
        total, rest = blocks[..., first] + blocks[..., second], blocks[..., first] - blocks[..., second]
        blocks = blocks.copy()
        blocks[..., first], blocks[..., second] = total, rest
        distance *= 2
    return blocks * F32(1 / np.sqrt(size))


def _stated(told: Mapping[str, Any], codes: Array, scales: Array, tensor_scale: Any, offsets: Any) -> Array:
    rows, _ = told["block"]
    if told["scale"] == "hif4":
        # bits 8 to 15: exponents of eights, 16 to 31 of fours; bits 0 to 7: 2 ** (e - 48) * (1 + m / 4)
        exponents = ((scales[..., None] >> np.arange(8, 32, dtype=np.uint32)) & 1).astype(np.int64)
        base = (scales & 255).astype(np.int64)
        factor = (1 + (base & 3) / 4) * 2.0 ** ((base >> 2) - 48)
        shift = exponents[..., :8].repeat(8, -1) + exponents[..., 8:].repeat(4, -1)
        values = np.array(told["table_values"][0], F32)[nibbles(codes)]
        return (values * (factor[..., None] * 2.0**shift).reshape(values.shape)).astype(F32)
    if "offset" in told:
        values = bits_of(codes, told["bits"]).astype(F32)
        scale, offset = (over_columns(a.astype(F32), values.shape[-1]) for a in (scales, offsets))
        return values * scale + offset if told["offset"] == "bias" else (values - offset) * scale
    tables = told["tables"]
    kinds: dict[str, Callable[[Array], Array]] = {
        "e4m3": lambda s: e4m3(s & 127) if len(tables) > 1 else e4m3(s),
        "e3m3": lambda s: small_float(s & 63, 3, 3),
        "e8m0": e8m0,
    }
    wide = kinds.get(told["scale"], lambda s: s.astype(F32))(scales)
    if told["tensor_scale"]:
        wide = wide * tensor_scale[..., None, None]
    if told["bits"] == 8:
        values = e4m3(codes) if tables == ["e4m3"] else codes.view(np.int8).astype(F32)
        spread = over_squares(wide, values.shape) if rows > 1 else over_columns(wide, values.shape[-1])
        return values * spread
    values = nibbles(codes)
    spread = over_columns(wide, values.shape[-1])
    if len(tables) == 1:
        return np.array(told["table_values"][0], F32)[values] * spread
    chosen = over_columns(scales >> int(told["selector"].rsplit(" ", 1)[1]), values.shape[-1])
    return np.array(told["table_values"], F32)[chosen, values] * spread


def compressed_tensors(stored: Stored) -> dict[str, Array]:
    """That library; MixFP4, which it does not know, by the pull request that defines it."""
    config = stored.config["quantization_config"]
    modules = _modules(stored, (".weight_packed", ".weight_scale"))
    if config["format"] == "mixfp4-pack-quantized":
        return {name: _mixfp4(parts) for name, parts in modules.items()}
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    found = {}
    for name, parts in modules.items():
        dtypes = {part: stored.dtypes[f"{name}.{part}"] for part in parts}
        values = decompress(parts, dtypes, scheme)
        found[name] = values.float().numpy().astype(str(values.dtype).rpartition(".")[2])
        for transform in config["transform_config"].get("config_groups", {}).values():
            if any(re.match(target[3:], name) for target in transform["apply"][0]["targets"]):
                found[name] = turned_back(values.float().numpy(), transform["head_dim"])
    return found


def _mixfp4(parts: Mapping[str, Array]) -> Array:
    """vllm-project/vllm#41004: bit 7 of the E4M3 scale chooses integers in sign and magnitude."""
    codes, raw = nibbles(parts["weight_packed"]), parts["weight_scale"].view(np.uint8)
    scale = over_columns(e4m3(raw & 127) / parts["weight_global_scale"], codes.shape[-1])
    chosen = over_columns(raw >> 7, codes.shape[-1])
    return np.where(chosen, INT4_SIGNED[codes], E2M1[codes]) * scale


def modelopt(stored: Stored) -> dict[str, Array]:
    """``weight_scale_2`` times ``weight_scale``; that library too, where it is installed."""
    found = {}
    for name, parts in _modules(stored, (".weight_scale",)).items():
        codes, scale = parts["weight"], parts["weight_scale"]
        if "weight_scale_2" in parts:
            scale = scale.astype(F32) * parts["weight_scale_2"]
            values, fmt = E2M1[nibbles(codes)], "nvfp4"
        else:
            values = codes.astype(F32)
            fmt = "mxfp8" if scale.dtype == np.uint8 else "fp8_channel" if scale.ndim == 1 else "fp8_block128"
        if fmt == "fp8_block128":
            found[name] = values * over_squares(scale[:, 0, :, 0], values.shape)
        elif fmt == "fp8_channel":
            found[name] = values * scale[:, None]
        else:
            found[name] = values * over_columns(e8m0(scale) if fmt == "mxfp8" else scale, values.shape[-1])
        if find_spec("modelopt"):
            from dialects.test_modelopt_library import library_values

            np.testing.assert_array_equal(library_values(dict(stored.tensors), name, fmt), found[name])
    return found


def fp8(stored: Stored) -> dict[str, Array]:
    """E4M3 times the scale of its square; transformers too, which reads whole squares only."""
    found = {}
    for name, parts in _modules(stored, (".weight_scale_inv",)).items():
        codes, scale = parts["weight"], parts["weight_scale_inv"]
        found[name] = codes.astype(F32) * over_squares(scale, codes.shape)
        if find_spec("torch") and not any(n % 128 for n in codes.shape):
            import torch
            from transformers.integrations.finegrained_fp8 import Fp8Dequantize

            pair = to_torch(codes, "F8_E4M3"), to_torch(scale, "F32")
            theirs = Fp8Dequantize(None)._dequantize_one(*pair, torch.float32)
            np.testing.assert_array_equal(theirs.numpy(), found[name])
    return found


def gpt_oss(stored: Stored) -> dict[str, Array]:
    """transformers' decoding of its Mxfp4Config, which gives [E, K, N]."""
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stacks = [name.removesuffix("_blocks") for name in stored.tensors if name.endswith("_blocks")]
    found = {}
    for stack in stacks:
        pair = (to_torch(stored.tensors[stack + part], "U8") for part in ("_blocks", "_scales"))
        found[stack] = convert_moe_packed_tensors(*pair, dtype=torch.float32).numpy()
    return found


def mlx(stored: Stored) -> dict[str, Array]:
    """``mx.dequantize`` with the parameters that config.json gives the module."""
    pytest.importorskip("mlx.core", reason="MLX is not installed")
    import mlx.core as mx

    settings, found = stored.config["quantization"], {}
    wrapped = stored.config["model_type"] == "qwen3_5_moe"
    for name, parts in _modules(stored, (".scales",)).items():
        path = name
        if wrapped:
            path = (
                name.replace("model.language_model.", "language_model.model.")
                if name != "lm_head"
                else ("language_model.lm_head")
            )
        told = dict(settings.get(path) or {k: settings[k] for k in ("group_size", "bits", "mode")})
        scaled = told.pop("global_scale", False)
        arrays = [
            mx.array(parts[p] if parts[p].itemsize == 1 or p == "weight" else parts[p].astype(F32))
            for p in ("weight", "scales", "biases")
            if p in parts
        ]
        if scaled:
            each = [
                mx.dequantize(*(a[e] for a in arrays), **told, global_scale=mx.array(g), dtype=mx.float32)
                for e, g in enumerate(parts["global_scale"])
            ]
            found[name] = np.array(mx.stack(each))
        else:
            found[name] = np.array(mx.dequantize(*arrays, **told, dtype=mx.float32))
    return found


def gguf(stored: Stored) -> dict[str, Array]:
    """gguf's own dequantization; where a global scale lies beside the weight, the exact product with it in FP64."""
    library = pytest.importorskip("gguf")
    (file,) = stored.folder.glob("*.gguf")
    tensors = {t.name: t for t in library.GGUFReader(file).tensors}
    plain = {library.GGMLQuantizationType[kind] for kind in ("F32", "F16", "BF16")}
    found = {}
    for name, tensor in tensors.items():
        if tensor.tensor_type in plain:
            continue
        values = library.quants.dequantize(tensor.data, tensor.tensor_type)
        scale = tensors.get(f"{name.removesuffix('.weight')}.scale")
        if scale is not None:
            values = values.astype(np.float64) * scale.data.reshape(-1, *(1,) * (values.ndim - 1))
        found[name] = values
    return found


def _modules(stored: Stored, marks: tuple[str, ...]) -> dict[str, dict[str, Array]]:
    """The tensors of each quantized module by their last word; one of ``marks`` tells such a module."""
    found: dict[str, dict[str, Array]] = {}
    for name in stored.tensors:
        for mark in marks:
            if name.endswith(mark):
                found.setdefault(name.removesuffix(mark), {})
    for name, array in stored.tensors.items():
        module, _, part = name.rpartition(".")
        if module in found:
            found[module][part] = array
    return found


JUDGES: dict[str, Callable[[Stored], dict[str, Array]]] = {
    "halfbyte": halfbyte,
    "compressed-tensors": compressed_tensors,
    "modelopt": modelopt,
    "fp8": fp8,
    "gpt-oss": gpt_oss,
    "mlx": mlx,
    "gguf": gguf,
}
"""By dialect; a new one needs a judge."""
