"""Block FP8 as DeepSeek, Qwen and Kimi publish it: ``P.weight`` in E4M3 and ``P.weight_scale_inv`` per 128x128 block.

The scale is a multiplier in spite of its name. Experts are written one by one; stacks (``T`` and ``T_scale_inv``)
and the older spelling with one ``P.weight_scale`` per tensor can be read too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.checkpoint import Inventory, TensorInfo
from halfbyte.dialects.capabilities import ActivationScales
from halfbyte.dialects.dialect import Dialect, register_dialect
from halfbyte.dialects.module_spelling import ModulePart, ModuleSpelling
from halfbyte.dialects.modules import is_linear, modules
from halfbyte.dialects.outputs import OutputTensor
from halfbyte.dialects.quantization_config import quantization_config_of
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.formats import Format, get_format
from halfbyte.models import Weight

_BLOCK = [128, 128]
_CODES = (".weight", "F8_E4M3")


class Fp8Spelling(ModuleSpelling):
    """128x128 block FP8; reads FP8 per tensor and stacks of experts too."""

    transposed_stacks = True

    def __init__(self) -> None:
        scale = ModulePart(".weight_scale", "F32", lambda shape: ())
        super().__init__(
            "fp8",
            {
                "fp8_block128": {"codes": _CODES, "scales": (".weight_scale_inv", "F32")},
                "fp8_tensor": {"codes": _CODES, "scales": scale},
            },
        )

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Refuse all formats but the block format."""
        if fmt.name != "fp8_block128":
            return f"the dialect fp8 holds fp8_block128 and nothing else, not {fmt.name}; use another dialect"
        return super().problem(weight, fmt)

    def stored(self, weight: Weight, fmt: Format, tensors: Mapping[str, TensorInfo]) -> list[OutputTensor]:
        """List the tensors of modules, or the two of a stack."""
        if f"{weight.name}_scale_inv" not in tensors or len(weight.shape) < 3:
            return super().stored(weight, fmt, tensors)
        scales = fmt.parts(weight.shape)["scales"][1]
        return [
            OutputTensor(weight.name, "F8_E4M3", weight.shape, "codes"),
            OutputTensor(f"{weight.name}_scale_inv", "F32", scales, "scales", rows_per_row=fmt.block[0]),
        ]

    def formats(self, inventory: Inventory) -> dict[str, Format]:
        """Take every E4M3 tensor, whose format is told by the scale beside it."""
        stated = quantization_config_of(inventory).get("weight_block_size")
        if stated not in (None, _BLOCK):
            raise CheckpointError(f"{inventory.source} has FP8 blocks of {stated}, but only {_BLOCK} can be read")
        tensors = inventory.tensors
        return {name: _format_of(name, tensors) for name, info in tensors.items() if info.dtype == "F8_E4M3"}


class Fp8Activations(ActivationScales):
    """Engines quantize inputs at run time; files of others may have scales."""

    endings = (".input_scale", ".activation_scale")


class Fp8Dialect(Dialect):
    """The published checkpoints with FP8 blocks of 128x128."""

    name = "fp8"
    about = "DeepSeek and Qwen block FP8 in vLLM, SGLang, transformers"
    spelling = Fp8Spelling()
    activations = Fp8Activations()

    def claims(self, inventory: Inventory) -> bool:
        """Recognise a checkpoint by its ``quant_method``."""
        return quantization_config_of(inventory).get("quant_method") == self.name

    def config(
        self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight], activations: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the configuration of the published checkpoints."""
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


def _format_of(name: str, tensors: Mapping[str, TensorInfo]) -> Format:
    if f"{name}_scale_inv" in tensors:
        return get_format("fp8_block128")
    if f"{name}_scale" in tensors:
        return get_format("fp8_tensor")
    spelled = f"{name.removesuffix('.weight')}.scale"
    if spelled in tensors:
        raise CheckpointError(f"{name} is FP8 and its scale is called {spelled}, a spelling that is not supported")
    raise CheckpointError(f"{name} is FP8, but {name}_scale_inv is missing; the checkpoint is incomplete")


FP8 = register_dialect(Fp8Dialect())
