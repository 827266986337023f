"""Block FP8 as DeepSeek, Qwen and Kimi publish it: ``P.weight`` in E4M3 and ``P.weight_scale_inv`` per 128x128 block.

The scale is a multiplier in spite of its name. Experts are written one by one; stacks (``T`` and ``T_scale_inv``)
and the older spelling with one ``P.weight_scale`` per tensor can be read too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from halfbyte.checkpoint import Inventory, TensorInfo
from halfbyte.dialects.dialect import Dialect, register_dialect
from halfbyte.dialects.modules import is_linear, module_problem, modules, stored_bytes
from halfbyte.dialects.outputs import Array, OutputTensor
from halfbyte.dialects.quantization_config import quantization_config_of
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.formats import BlockFormat, Format, get_format
from halfbyte.models import Weight

_BLOCK = [128, 128]


class Fp8Dialect(Dialect):
    """128x128 block FP8."""

    name = "fp8"
    about = "DeepSeek and Qwen block FP8 in vLLM, SGLang, transformers"
    input_scales = (".input_scale", ".activation_scale")
    upright = False

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Only the block format, only weights of modules."""
        if fmt.name != "fp8_block128":
            return f"the dialect fp8 holds fp8_block128 and nothing else, not {fmt.name}; use another dialect"
        return module_problem(weight, fmt, self.name)

    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """Weight and scales per module."""
        assert isinstance(fmt, BlockFormat)
        found = []
        for m in modules(weight):
            found.append(OutputTensor(f"{m.name}.weight", "F8_E4M3", (m.n, m.k), "codes", m.expert, m.rows))
            if fmt.block[0] < 0:
                found.append(OutputTensor(f"{m.name}.weight_scale", "F32", (), "scales", m.expert, None, 0))
            else:
                scales = (f"{m.name}.weight_scale_inv", "F32", fmt.scales_shape((m.n, m.k)))
                found.append(OutputTensor(*scales, "scales", m.expert, m.rows, fmt.block[0]))
        return found

    def stored(self, weight: Weight, fmt: Format, tensors: Mapping[str, TensorInfo]) -> list[OutputTensor]:
        """As written, or a stack in one tensor."""
        if f"{weight.name}_scale_inv" not in tensors or len(weight.shape) < 3:
            return super().stored(weight, fmt, tensors)
        assert isinstance(fmt, BlockFormat)
        scales = fmt.scales_shape(weight.shape)
        return [
            OutputTensor(weight.name, "F8_E4M3", weight.shape, "codes"),
            OutputTensor(f"{weight.name}_scale_inv", "F32", scales, "scales", rows_per_row=fmt.block[0]),
        ]

    def pack(self, output: OutputTensor, part: Array, fmt: Format) -> Array:
        """As in memory."""
        return part

    def unpack(self, output: OutputTensor, stored: Array, fmt: Format, shape: tuple[int, ...]) -> Array:
        """Codes as bytes; scales of any type as they are."""
        return (stored_bytes(stored) if output.part == "codes" else stored).reshape(shape)

    def config(self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight]) -> dict[str, Any]:
        """The configuration of the published checkpoints."""
        formats = {fmt.name for _, fmt in quantized}
        if len(formats) > 1:
            raise PlanError(
                f"the dialect fp8 has one kind of scale per checkpoint, not {' and '.join(sorted(formats))}"
            )
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            **({"weight_block_size": _BLOCK} if "fp8_block128" in formats else {}),
            "modules_to_not_convert": sorted({m.name for w in kept if is_linear(w) for m in modules(w)}),
        }

    def claims(self, inventory: Inventory) -> bool:
        """By ``quant_method``."""
        return quantization_config_of(inventory).get("quant_method") == self.name

    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """Every E4M3 tensor with its scale beside it."""
        stated = quantization_config_of(inventory).get("weight_block_size")
        if stated not in (None, _BLOCK):
            raise CheckpointError(f"{inventory.source} has FP8 blocks of {stated}, but only {_BLOCK} can be read")
        codes = {name for name, info in inventory.tensors.items() if info.dtype == "F8_E4M3"}
        scales = dict(_scales(codes, inventory.tensors))
        tensors: dict[str, TensorInfo] = {}
        formats: dict[str, Format] = {}
        companions = {scale for scale, _ in scales.values()}
        for name, info in inventory.tensors.items():
            if name in scales:
                formats[name] = scales[name][1]
                tensors[name] = TensorInfo(name, "BF16", info.shape, info.file, info.offset, info.nbytes)
            elif name not in companions:
                tensors[name] = info
        return tensors, formats


def _scales(codes: set[str], tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, tuple[str, Format]]]:
    """For each FP8 tensor its scale's name and the format."""
    block, whole = get_format("fp8_block128"), get_format("fp8_tensor")
    for name in codes:
        if f"{name}_scale_inv" in tensors:
            yield name, (f"{name}_scale_inv", block)
        elif f"{name}_scale" in tensors:
            yield name, (f"{name}_scale", whole)
        else:
            raise CheckpointError(f"{name} is FP8, but {name}_scale_inv is missing; the checkpoint is incomplete")


FP8 = register_dialect(Fp8Dialect())
