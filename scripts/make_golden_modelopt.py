"""Record what NVIDIA ModelOpt writes and decodes, in tests/golden/modelopt.json.

Run it in an environment with nvidia-modelopt, torch and transformers; halfbyte is not needed there:

    python scripts/make_golden_modelopt.py

It quantizes tiny random models with modelopt's own recipes, exports them on the CPU and records names, dtypes, shapes
and configurations. Of each layout it records digests of the FP32 values that modelopt's classes make of bytes from
tests/formats/streams.py.
"""

from __future__ import annotations

import copy
import json
import struct
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

from formats.streams import digests, random_bytes  # noqa: E402

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}


def build(experts: bool) -> Any:
    """A tiny Qwen3, dense or with two experts, in BF16."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    if experts:
        config = Qwen3MoeConfig(**COMMON, moe_intermediate_size=64, num_experts=2, num_experts_per_tok=1)
        model = Qwen3MoeForCausalLM(config)
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**COMMON))
    model.config.architectures = [type(model).__name__]
    return model.bfloat16()


def recipe(name: str) -> dict[str, Any]:
    """A recipe of modelopt by name; ``mixed``: NVFP4 with attention in FP8."""
    import modelopt.torch.quantization as mtq

    if name != "mixed":
        return copy.deepcopy(getattr(mtq, name))
    mixed = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    for kind in ("weight", "input"):
        rule = {"quantizer_name": f"*self_attn*{kind}_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}}
        mixed["quant_cfg"].append(rule)
    return mixed


def export(name: str, experts: bool) -> dict[str, Any]:
    """What modelopt writes for a recipe: configurations and header entries."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    tokens = torch.arange(64).reshape(2, 32)
    model = mtq.quantize(build(experts), recipe(name), lambda m: m(tokens))
    with tempfile.TemporaryDirectory() as folder:
        export_hf_checkpoint(model, export_dir=folder)
        path = Path(folder)
        config = json.loads((path / "config.json").read_text())
        raw = (path / "model.safetensors").read_bytes()
        header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        return {
            "model_type": config["model_type"],
            "quantization_config": config["quantization_config"],
            "hf_quant_config": json.loads((path / "hf_quant_config.json").read_text()),
            "tensors": {k: [v["dtype"], v["shape"]] for k, v in header.items() if k != "__metadata__"},
        }


def decode() -> dict[str, list[str]]:
    """Digests of FP32 values of random bytes, by modelopt's tensor classes."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor

    shape, wide = torch.Size((64, 512)), torch.float32
    nibbles = torch.from_numpy(random_bytes((64, 256), 20))
    codes = random_bytes((64, 512), 21)
    codes[(codes & 127) == 127] = 0
    eight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    e4m3 = torch.from_numpy(random_bytes((64, 32), 22, 1, 127)).view(torch.float8_e4m3fn)
    e8m0 = torch.from_numpy(random_bytes((64, 16), 23, 20, 220))
    scales = torch.from_numpy(random_bytes((64, 4), 24, 1, 255).astype(np.float32) / np.float32(1000))
    blocks = {-1: 128, -2: 128}
    values = {
        "nvfp4": NVFP4QTensor(shape, wide, nibbles).dequantize(
            wide, scale=e4m3, double_scale=scales[0, 0], block_sizes={-1: 16}
        ),
        "mxfp4": MXFP4QTensor(shape, wide, nibbles).dequantize(wide, scale=e8m0, block_sizes={-1: 32}),
        "mxfp8": MXFP8QTensor(shape, wide, eight).dequantize(wide, scale=e8m0),
        "fp8_tensor": FP8QTensor(shape, wide, eight).dequantize(wide, scale=scales[0, 0]),
        "fp8_channel": FP8QTensor(shape, wide, eight).dequantize(wide, scale=scales[:, :1]),
        "fp8_block128": FP8QTensor(shape, wide, eight).dequantize(wide, scale=scales[:1], block_sizes=blocks),
    }
    # the sign of modelopt's zeros is not definite
    return {name: digests(found.numpy() + np.float32(0)) for name, found in values.items()}


def main() -> None:
    """Write the golden file."""
    torch.set_num_threads(1)
    names = {
        "nvfp4_experts": ("NVFP4_DEFAULT_CFG", True),
        "nvfp4_weights": ("W4A16_NVFP4_CFG", False),
        "fp8": ("FP8_DEFAULT_CFG", False),
        "fp8_channel": ("FP8_PER_CHANNEL_PER_TOKEN_CFG", False),
        "fp8_block": ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", False),
        "mxfp8": ("MXFP8_DEFAULT_CFG", False),
        "mxfp4": ("MXFP4_DEFAULT_CFG", False),
        "mixed": ("mixed", False),
    }
    exports = {key: export(*arguments) for key, arguments in names.items()}
    versions = {package: version(package) for package in ("nvidia-modelopt", "torch", "transformers", "numpy")}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in exports.items())
    head = f'"versions": {json.dumps(versions)},\n "decode": {json.dumps(decode())}'
    text = f'{{\n {head},\n "exports": {{\n{lines}\n }}\n}}'
    path = REPOSITORY / "tests" / "golden" / "modelopt.json"
    path.write_text(text + "\n")
    print(f"{path}: {len(exports)} exports, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
