"""Block FP8 as DeepSeek and Qwen publish it: ``P.weight`` in E4M3 and ``P.weight_scale_inv`` per 128x128 block.

The scale is a multiplier in spite of its name. Stacked experts have ``T`` and ``T_scale_inv``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.checkpoint import Inventory, TensorInfo
from halfbyte.dialects.base import Array, Dialect, OutputTensor, quantization_config_of, register_dialect
from halfbyte.dialects.modules import modules, stored_bytes
from halfbyte.errors import CheckpointError
from halfbyte.formats import BlockFormat, Format, get_format
from halfbyte.models import Weight

_BLOCK = [128, 128]


class Fp8Dialect(Dialect):
    """128x128 block FP8."""

    name = "fp8"
    about = "DeepSeek and Qwen block FP8 in vLLM, SGLang, transformers"

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Only the block format, only matrices that are modules of their own."""
        if fmt.name != "fp8_block128":
            return f"the fp8 dialect holds fp8_block128 and nothing else, not {fmt.name}; use another dialect"
        if any(first % _BLOCK[0] for _, first, _ in weight.row_parts):
            return f"the projections fused in {weight.name} do not begin at blocks of {_BLOCK[0]} rows"
        return None

    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """Weight and scales per module; a stack that is one tensor in its source stays one."""
        assert isinstance(fmt, BlockFormat)
        if len(weight.shape) == 3 and weight.pieces[0].expert is None:
            scales = fmt.scales_shape(weight.shape)
            return [
                OutputTensor(weight.name, "F8_E4M3", weight.shape, "codes"),
                OutputTensor(f"{weight.name}_scale_inv", "F32", scales, "scales", rows_per_row=_BLOCK[0]),
            ]
        found = []
        for m in modules(weight):
            scales = fmt.scales_shape((m.n, m.k))
            found.append(OutputTensor(f"{m.name}.weight", "F8_E4M3", (m.n, m.k), "codes", m.expert, m.rows))
            found.append(
                OutputTensor(f"{m.name}.weight_scale_inv", "F32", scales, "scales", m.expert, m.rows, _BLOCK[0])
            )
        return found

    def pack(self, output: OutputTensor, part: Array, fmt: Format) -> Array:
        """As in memory."""
        return part

    def unpack(self, output: OutputTensor, stored: Array, fmt: Format) -> Array:
        """Codes as bytes."""
        return stored_bytes(stored)

    def config(self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight]) -> dict[str, Any]:
        """The configuration of the published checkpoints."""
        names = sorted({m.name for w in kept if len(w.shape) == 2 for m in modules(w)})
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": _BLOCK,
            "modules_to_not_convert": names,
        }

    def claims(self, inventory: Inventory) -> bool:
        """By ``quant_method``."""
        return quantization_config_of(inventory).get("quant_method") == "fp8"

    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """Every E4M3 tensor with a ``_scale_inv`` beside it."""
        stated = quantization_config_of(inventory).get("weight_block_size")
        if stated != _BLOCK:
            raise CheckpointError(f"{inventory.source} has FP8 blocks of {stated}, but only {_BLOCK} can be read")
        fmt = get_format("fp8_block128")
        tensors: dict[str, TensorInfo] = {}
        formats: dict[str, Format] = {}
        for name, info in inventory.tensors.items():
            if info.dtype == "F8_E4M3":
                if f"{name}_scale_inv" not in inventory.tensors:
                    raise CheckpointError(f"{name} is FP8 but {name}_scale_inv is missing; the checkpoint is incomplete")
                formats[name] = fmt
                tensors[name] = TensorInfo(name, "BF16", info.shape, info.file, info.offset, info.nbytes)
            elif not name.endswith("_scale_inv"):
                tensors[name] = info
        return tensors, formats


FP8 = register_dialect(Fp8Dialect())
