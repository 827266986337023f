"""gpt-oss MXFP4: stacked experts as ``T_blocks`` [E, N, K/32, 16] and ``T_scales`` [E, N, K/32] (E8M0).

The spelling of transformers' Mxfp4Config. The stacks lie as [E, N, K], gate and up rows alternating, while the
unquantized gpt-oss experts lie as [E, K, N].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.checkpoint import Inventory, TensorInfo
from halfbyte.dialects.dialect import Dialect, register_dialect
from halfbyte.dialects.modules import is_linear
from halfbyte.dialects.outputs import OutputTensor
from halfbyte.dialects.quantization_config import quantization_config_of
from halfbyte.dialects.spelling import Spelling
from halfbyte.errors import CheckpointError
from halfbyte.formats import Format, get_format
from halfbyte.models import Weight
from halfbyte.models.name_templates import normalise

_BLOCK = 32


class GptOssSpelling(Spelling):
    """Stacked experts in MXFP4, as gpt-oss has them."""

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Refuse all but stacked experts of gpt-oss in MXFP4."""
        if fmt.name != "mxfp4" or len(weight.shape) != 3:
            return "the dialect gpt-oss holds stacked experts in mxfp4 and nothing else; use another dialect"
        if weight.pieces[0].expert is not None or (weight.row_parts and not weight.interleaved):
            return "the dialect gpt-oss is read for gpt-oss models only, whose stacks alternate gate and up rows"
        return None

    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """List the tensors of blocks and of scales."""
        experts, n, k = weight.shape
        return [
            OutputTensor(f"{weight.name}_blocks", "U8", (experts, n, k // _BLOCK, _BLOCK // 2), "codes"),
            OutputTensor(f"{weight.name}_scales", "U8", (experts, n, k // _BLOCK), "scales"),
        ]

    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """Replace blocks and scales by the stack that they hold."""
        fmt = get_format("mxfp4")
        tensors: dict[str, TensorInfo] = {}
        formats: dict[str, Format] = {}
        for name, info in inventory.tensors.items():
            stack = name.removesuffix("_blocks")
            if stack != name:
                if info.dtype != "U8" or len(info.shape) != 4 or info.shape[-1] != _BLOCK // 2:
                    raise CheckpointError(
                        f"{name} is {info.dtype} {list(info.shape)}, but MXFP4 blocks are U8 [E, N, K/32, 16]"
                    )
                shape = (*info.shape[:-2], info.shape[-2] * _BLOCK)
                tensors[stack] = TensorInfo(stack, "BF16", shape, info.file, info.offset, info.nbytes)
                formats[stack] = fmt
            elif not (name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in inventory.tensors):
                tensors[name] = info
        return tensors, formats


class GptOssDialect(Dialect):
    """gpt-oss as OpenAI publishes it."""

    name = "gpt-oss"
    about = "gpt-oss in transformers, vLLM, SGLang"
    spelling = GptOssSpelling()

    def claims(self, inventory: Inventory) -> bool:
        """Recognise a checkpoint by its ``quant_method``."""
        return quantization_config_of(inventory).get("quant_method") == "mxfp4"

    def config(
        self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight], activations: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what the published checkpoints state."""
        names = {w.name.removesuffix(".weight") for w in kept if is_linear(w) or w.role in ("embedding", "lm_head")}
        return {
            "quant_method": "mxfp4",
            "modules_to_not_convert": sorted({normalise(name).replace("#", "*") for name in names}),
        }


GPT_OSS = register_dialect(GptOssDialect())
