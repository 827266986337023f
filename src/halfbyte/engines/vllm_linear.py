"""vLLM's linear layers whose weights stay as they lie in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.platforms import current_platform

from halfbyte.checkpoint import Reader
from halfbyte.engines.vllm_device import linear_product, multiplies
from halfbyte.engines.vllm_ops import multiply, number_of
from halfbyte.formats import QuantizedTensor
from halfbyte.models import Weight
from halfbyte.runtime import packed
from halfbyte.source.checkpoint import Checkpoint


@dataclass(frozen=True)
class Part:
    """Rows ``first``..``stop`` of a checkpoint's weight, and of these the columns ``left``..``right``."""

    weight: Weight
    first: int
    stop: int
    left: int
    right: int

    def fits(self, checkpoint: Checkpoint) -> bool:
        """Whether it can be cut out at the borders of blocks and bytes, and multiplied with as it is."""
        fmt, (rows, columns) = checkpoint.formats[self.weight.name], self.weight.shape
        height, width = fmt.block
        upright = height <= 1 or (self.first % height == 0 and (self.stop % height == 0 or self.stop == rows))
        inner = [column for column in (self.left, self.right) if 0 < column < columns]
        return (
            upright
            and multiplies(fmt, current_platform.device_type)
            and all(_is_border(column, width, fmt.bits) for column in inner)
        )

    def read(self, checkpoint: Checkpoint, reader: Reader) -> QuantizedTensor:
        """Codes and scales of the part."""
        tensor = checkpoint.read_quantized(reader, self.weight, self.first, self.stop)
        if (self.left, self.right) == (0, self.weight.shape[1]):
            return tensor
        return packed.columns_of(tensor, self.left, self.right)


def _is_border(column: int, width: int, bits: int) -> bool:
    return column * bits % 8 == 0 and (width < 1 or column % width == 0)


@register_weight_loader_v2_supported_method
class HalfbyteLinearMethod(LinearMethodBase):
    """Multiplies with the weights of a checkpoint that lie side by side in a layer, each in its own format.

    Where a rank's share of them cannot be multiplied with as it is, the layer becomes an unquantized one, whose
    weights the loader decodes.
    """

    def __init__(self, checkpoint: Checkpoint, weights: Sequence[Weight], mode: str) -> None:
        self.checkpoint, self.weights, self.mode = checkpoint, tuple(weights), mode
        self.parts: list[Part] = []
        self.product: Any = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Find the layer's rows and columns in the checkpoint; nothing is allocated before these are read."""
        self.parts = self._parts(layer, input_size_per_partition, output_partition_sizes, input_size)
        if not self.parts:
            layer.quant_method = UnquantizedLinearMethod()
            sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size)
            layer.quant_method.create_weights(layer, *sizes, params_dtype, **extra_weight_attrs)

    def _parts(self, layer: torch.nn.Module, columns: int, sizes: list[int], all_columns: int) -> list[Part]:
        total = sum(weight.shape[0] for weight in self.weights)
        spans = row_spans(layer, sizes, total)
        if spans is None or any(weight.shape[1] != all_columns for weight in self.weights):
            return []
        left = layer.tp_rank * columns if columns != all_columns else 0
        parts = [Part(w, a, b, left, left + columns) for span in spans for w, a, b in _within(self.weights, *span)]
        return parts if all(part.fits(self.checkpoint) for part in parts) else []

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Read and pack the weights."""
        with Reader(self.checkpoint.inventory) as reader:
            tensors = [part.read(self.checkpoint, reader) for part in self.parts]
        self.product = linear_product(tensors, torch.device(current_platform.device_type))
        layer.register_buffer("halfbyte_product", number_of(self.product), persistent=False)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x W^T + bias."""
        y = multiply(x, layer.halfbyte_product, self.product, self.mode)
        return y if bias is None else y + bias


def row_spans(layer: torch.nn.Module, sizes: list[int], total: int) -> list[tuple[int, int]] | None:
    """Rows of a rank, in those of the layer's weights one below the other; None for a layer of an unknown kind.

    ``sizes``: how many rows of each of the layer's outputs are this rank's; ``total``: rows of all ranks.
    """
    kind = type(layer)
    if kind in (ReplicatedLinear, RowParallelLinear):
        return [(0, total)] if sum(sizes) == total else None
    if kind not in (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear):
        return None
    ranks = [layer.tp_rank] * len(sizes)
    whole = [size * layer.tp_size for size in sizes]
    if kind is QKVParallelLinear:
        copies = layer.num_kv_head_replicas
        ranks[1:] = [layer.tp_rank // copies] * 2
        whole[1:] = [size // copies for size in whole[1:]]
    if sum(whole) != total:
        return None
    starts = [sum(whole[:i]) + rank * size for i, (rank, size) in enumerate(zip(ranks, sizes, strict=True))]
    return [(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _within(weights: Sequence[Weight], first: int, stop: int) -> Iterator[tuple[Weight, int, int]]:
    """Rows first..stop of weights that lie one below the other, as rows of each."""
    offset = 0
    for weight in weights:
        begin, end = max(first, offset), min(stop, offset + weight.shape[0])
        if begin < end:
            yield weight, begin - offset, end - offset
        offset += weight.shape[0]
