"""The modules of MLX: names and packing of quantized weights.

Per module P: ``P.weight`` (U32 words, first code in the lowest bits), ``P.scales`` and, for affine formats,
``P.biases``. Experts are one stack per projection; in NVFP4 with ``P.global_scale`` (F32 [E]; a value is
table x scale x global_scale / 2688), which MLX has for experts only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from halfbyte.checkpoint import Inventory, TensorInfo
from halfbyte.dialects.mlx_names import Model, is_stack
from halfbyte.dialects.mlx_source import Source
from halfbyte.dialects.outputs import Array, OutputTensor
from halfbyte.dialects.spelling import Spelling
from halfbyte.formats import Format, get_format
from halfbyte.models import Weight

_BLOCK_FORMATS = ("mxfp4", "mxfp8", "nvfp4", "nvfp4_unscaled")
_TOP = np.float32(2688)  # 6 * 448: global_scale is the amax that this global scale maps to the largest value


class MlxSpelling(Spelling):
    """Affine formats of 2 to 8 bits, MXFP4, MXFP8 and NVFP4, for a model; ``source``: a checkpoint read as such."""

    power_of_two = True

    def __init__(self, model: Model, source: Source | None) -> None:
        self.model = model
        self.source = source

    def format_for(self, weight: Weight, fmt: Format) -> Format:
        """Return NVFP4 without a global scale where the weight is no stack of experts: only those have one."""
        return fmt if fmt.name != "nvfp4" or is_stack(weight) else get_format("nvfp4_unscaled")

    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Refuse formats that MLX has no kernels for, and weights that it does not quantize."""
        if fmt.offset != "bias" and fmt.name not in _BLOCK_FORMATS:
            return f"MLX has no mode for {fmt.name}; choose affine4, mxfp4, nvfp4 or another format of its list"
        if weight.role.startswith("mtp."):
            return f"{weight.name} predicts further tokens, and MLX programs read such weights unquantized; keep it"
        if len(weight.shape) != 2 and not is_stack(weight):
            return f"MLX quantizes matrices and stacks of experts, and {weight.name} has the shape {list(weight.shape)}"
        if len(weight.shape) == 2 and not weight.name.endswith(".weight"):
            return f"MLX stores modules, and {weight.name} is not the weight of one"
        if self.model.tied and weight.role == "lm_head":
            return "the embeddings are tied, and mlx-lm then wants no lm_head; drop it by a rule"
        return None

    def shape_problem(self, weight: Weight, fmt: Format) -> str | None:
        """Refuse NVFP4 where MLX on CPUs cannot run it."""
        if fmt.name.startswith("nvfp4") and weight.shape[-1] % 32:
            return f"K = {weight.shape[-1]} is not a multiple of 32, which MLX on CPUs needs for nvfp4"
        return None

    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """List the tensors of each module, in MLX's names."""
        if len(weight.shape) == 2:
            return list(_outputs(weight.name.removesuffix(".weight"), weight.shape, None, fmt))
        experts, _, k = weight.shape
        projections = self.model.projections(weight)
        return [o for module, rows, n in projections for o in _outputs(module, (experts, n, k), rows, fmt)]

    def stored(self, weight: Weight, fmt: Format, tensors: Mapping[str, TensorInfo]) -> list[OutputTensor]:
        """List the tensors under the names that a checkpoint has, which may be those of the modules."""
        return [o._replace(name=self._stored_name(o.name, tensors)) for o in self.outputs(weight, fmt)]

    def pack(self, output: OutputTensor, part: Array, fmt: Format) -> Array:
        """View codes as words, and multiply the global scale by 2688, which is exact for powers of two."""
        if output.part == "codes":
            return np.ascontiguousarray(part).view("<u4")
        return _global_scale(part) if output.part == "global_scale" else part

    def unpack(self, output: OutputTensor, stored: Array, fmt: Format, shape: tuple[int, ...]) -> Array:
        """View words as bytes and divide the global scale by 2688: the inverse of ``pack``."""
        if output.part == "codes":
            return np.ascontiguousarray(stored).view(np.uint8).reshape(shape)
        return np.asarray((stored / _TOP if output.part == "global_scale" else stored).reshape(shape))

    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """Return original names, fused experts, and layouts as before MLX's conversion."""
        source = self.source or Source(inventory, Model.of(inventory.config))
        return source.tensors, source.formats

    def _stored_name(self, name: str, tensors: Mapping[str, TensorInfo]) -> str:
        module, _, last = name.rpartition(".")
        return name if name in tensors else f"{self.model.path(module)}.{last}"


def _outputs(
    module: str, shape: tuple[int, ...], rows: tuple[int, int, int] | None, fmt: Format
) -> Iterator[OutputTensor]:
    parts = fmt.parts(shape)
    words = (*shape[:-1], parts["codes"][1][-1] // 4)
    yield OutputTensor(f"{module}.weight", "U32", words, "codes", None, rows)
    affine = fmt.offset is not None
    yield OutputTensor(f"{module}.scales", "BF16" if affine else "U8", parts["scales"][1], "scales", None, rows)
    if affine:
        yield OutputTensor(f"{module}.biases", "BF16", parts["offsets"][1], "offsets", None, rows)
    if fmt.has_global_scale:
        yield OutputTensor(f"{module}.global_scale", "F32", shape[:-2], "global_scale", None, None, 0)


def _global_scale(scale: Array) -> Array:
    """Return what gives the global scale again when MLX divides it by 2688.

    There is one for every scale that MLX stored.
    """
    stored = np.asarray(scale, dtype=np.float32) * _TOP
    for near in (np.nextafter(stored, np.float32(0)), np.nextafter(stored, np.float32(np.inf))):
        stored = np.where((stored / _TOP != scale) & (near / _TOP == scale), near, stored)
    return np.asarray(stored, dtype=np.float32)
