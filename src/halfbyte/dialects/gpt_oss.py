"""gpt-oss MXFP4: stacked experts as ``T_blocks`` [E, N, K/32, 16] and ``T_scales`` [E, N, K/32] (E8M0).

The spelling of transformers' Mxfp4Config; the stacks lie as [E, N, K], unlike the unquantized gpt-oss experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.checkpoint import Inventory, TensorInfo
from halfbyte.dialects.base import Array, Dialect, OutputTensor, quantization_config_of, register_dialect
from halfbyte.errors import CheckpointError
from halfbyte.formats import Format, get_format
from halfbyte.models import Weight

_BLOCK = 32


class GptOssDialect(Dialect):
    """MXFP4 experts of gpt-oss."""

    name = "gpt-oss"
    about = "gpt-oss in transformers, vLLM, SGLang"

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Only stacked experts, only MXFP4."""
        if fmt.name != "mxfp4" or len(weight.shape) != 3:
            return "the gpt-oss dialect holds stacked experts in mxfp4 and nothing else; use another dialect"
        return None

    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """Blocks and scales."""
        experts, n, k = weight.shape
        return [
            OutputTensor(f"{weight.name}_blocks", "U8", (experts, n, k // _BLOCK, _BLOCK // 2), "codes"),
            OutputTensor(f"{weight.name}_scales", "U8", (experts, n, k // _BLOCK), "scales"),
        ]

    def pack(self, output: OutputTensor, part: Array, fmt: Format) -> Array:
        """Codes are only viewed by blocks."""
        return part

    def unpack(self, output: OutputTensor, stored: Array, fmt: Format) -> Array:
        """Codes are only viewed by rows."""
        return stored.reshape(*stored.shape[:2], -1)

    def config(self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight]) -> dict[str, Any]:
        """As the published checkpoints state it."""
        patterns = ("self_attn", "mlp.router")
        return {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [*(f"model.layers.*.{p}" for p in patterns), "model.embed_tokens", "lm_head"],
        }

    def claims(self, inventory: Inventory) -> bool:
        """By ``quant_method``."""
        return quantization_config_of(inventory).get("quant_method") == "mxfp4"

    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """Replace blocks and scales by the stack that they hold."""
        fmt = get_format("mxfp4")
        tensors: dict[str, TensorInfo] = {}
        formats: dict[str, Format] = {}
        for name, info in inventory.tensors.items():
            stack = name.removesuffix("_blocks")
            if stack != name:
                scales = inventory.tensors.get(f"{stack}_scales")
                if scales is None or scales.shape != info.shape[:-1]:
                    raise CheckpointError(f"{name} has no {stack}_scales of matching shape; the checkpoint is incomplete")
                shape = (*info.shape[:-2], info.shape[-2] * _BLOCK)
                tensors[stack] = TensorInfo(stack, "BF16", shape, info.file, info.offset, info.nbytes)
                formats[stack] = fmt
            elif not (name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in inventory.tensors):
                tensors[name] = info
        return tensors, formats


GPT_OSS = register_dialect(GptOssDialect())
