"""vLLM's mixtures of experts whose weights stay as they lie in the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from halfbyte.checkpoint import Reader
from halfbyte.dialects import UnequalScalesError
from halfbyte.engines.vllm_device import experts_product, has_mixture
from halfbyte.engines.vllm_linear import Part
from halfbyte.engines.vllm_ops import mix, number_of
from halfbyte.formats import QuantizedTensor
from halfbyte.models import Weight
from halfbyte.runtime import packed
from halfbyte.runtime.decode import to_torch
from halfbyte.source.checkpoint import Checkpoint

_ACTIVATIONS = {
    MoEActivation.SILU: "silu",
    MoEActivation.GELU_TANH: "gelu_tanh",
    MoEActivation.SWIGLUOAI: "clamped_swiglu",
    MoEActivation.RELU2_NO_MUL: "relu2",
}


class HalfbyteMoEMethod(FusedMoEMethodBase):
    """Runs the experts of a layer in the formats of the checkpoint: ``up`` [E, 2W or W, K] and ``down`` [E, N, W]."""

    def __init__(self, layer: torch.nn.Module, checkpoint: Checkpoint, up: Weight, down: Weight) -> None:
        super().__init__(layer.moe_config)
        self.checkpoint, self.up, self.down = checkpoint, up, down
        self.weights = (up, down)
        self.parts = self._parts(layer)
        self.product: Any = None

    def _parts(self, layer: torch.nn.Module) -> list[Part]:
        """What this rank needs of each expert: rows of ``up``, then columns of ``down``; [] where it cannot be cut.

        Nothing is replaced by copies, padded or fused here, which some of vLLM's own kernels want.
        """
        moe, parallel = self.moe, self.moe.moe_parallel_config
        width, ranks, rank = moe.intermediate_size_per_partition, parallel.tp_size, parallel.tp_rank
        gated, interleaved = moe.activation.is_gated, moe.activation is MoEActivation.SWIGLUOAI
        halves = 2 if gated else 1
        plain = (
            moe.activation in _ACTIVATIONS
            and self.up.shape == (moe.num_logical_experts, halves * width * ranks, moe.hidden_dim)
            and self.down.shape == (moe.num_logical_experts, moe.hidden_dim, width * ranks)
            and moe.num_experts == moe.num_logical_experts
            and self.up.interleaved == interleaved
            and not layer.apply_router_weight_on_input
            and has_mixture(_ACTIVATIONS[moe.activation], gated, width, current_platform.device_type)
        )
        if not plain:
            return []
        up, down = (replace(weight, shape=weight.shape[1:]) for weight in self.weights)
        start, columns = rank * width, up.shape[1]
        if interleaved:
            parts = [Part(up, 2 * start, 2 * (start + width), 0, columns)]
        else:
            parts = [
                Part(up, half * width * ranks + start, half * width * ranks + start + width, 0, columns)
                for half in range(halves)
            ]
        parts.append(Part(down, 0, down.shape[0], start, start + width))
        return parts if all(part.fits(self.checkpoint) for part in parts) else []

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room for the experts' biases; their weights are read later."""
        if self.moe.has_bias:
            halves = 2 if self.moe.activation.is_gated else 1
            for name, width in (("w13_bias", halves * intermediate_size_per_partition), ("w2_bias", hidden_size)):
                zeros = torch.zeros(num_experts, width, dtype=params_dtype)
                layer.register_parameter(name, torch.nn.Parameter(zeros, requires_grad=False))
                set_weight_attrs(getattr(layer, name), extra_weight_attrs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Read and pack the weights of this rank's experts."""
        experts = _experts_of(layer)
        try:
            with Reader(self.checkpoint.inventory) as reader:
                up, down = (self._read(reader, weight, experts) for weight in self.weights)
        except UnequalScalesError:
            self._decode(layer, experts)
            return
        biases = {"gate_up_bias": None, "down_bias": None}
        if self.moe.has_bias:
            biases = {
                "gate_up_bias": layer.w13_bias.float().cpu().numpy(),
                "down_bias": layer.w2_bias.float().cpu().numpy(),
            }
        self.product = experts_product(
            up,
            down,
            torch.device(current_platform.device_type),
            activation=_ACTIVATIONS[self.moe.activation],
            gated=self.moe.activation.is_gated,
            interleaved=self.up.interleaved,
            **biases,
        )
        layer.register_buffer("halfbyte_product", number_of(self.product), persistent=False)

    def _read(self, reader: Reader, weight: Weight, experts: Sequence[range]) -> QuantizedTensor:
        """The share of this rank in a stack: of runs of consecutive experts, rows and columns."""
        runs = [self.checkpoint.read_quantized(reader, weight, run.start, run.stop) for run in experts]
        parts = [part for part in self.parts if part.weight.name == weight.name]
        return _stacked([_cut(run, parts) for run in runs])

    def _decode(self, layer: torch.nn.Module, experts: Sequence[range]) -> None:
        """Make the layer an unquantized one: gate and up of an expert have a global scale each."""
        plain = UnquantizedFusedMoEMethod(self.moe)
        sizes = (layer.local_num_experts, layer.hidden_size, self.moe.intermediate_size_per_partition)
        plain.create_weights(layer, *sizes, layer.params_dtype, weight_loader=layer.weight_loader)
        with Reader(self.checkpoint.inventory) as reader:
            for name, weight in (("w13_weight", self.up), ("w2_weight", self.down)):
                parts = [part for part in self.parts if part.weight.name == weight.name]
                values = [self.checkpoint.read(reader, weight, run.start, run.stop) for run in experts]
                whole = np.concatenate(values)
                share = np.concatenate([whole[:, p.first : p.stop, p.left : p.right] for p in parts], axis=1)
                getattr(layer, name).data.copy_(to_torch(share))
        layer._replace_quant_method(plain)
        plain.process_weights_after_loading(layer)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """vLLM's own kernels do not run."""

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the weighted sum of each token's experts that are this rank's."""
        chosen = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        return mix(x, chosen, topk_weights, layer.halfbyte_product, self.product, "exact")


def _experts_of(layer: torch.nn.Module) -> list[range]:
    """Numbers of the experts that are this rank's, in their order there, as runs."""
    places = layer.expert_map
    if places is None:
        return [range(layer.local_num_experts)]
    numbers = (places >= 0).nonzero().flatten()
    ordered = [int(number) for number in numbers[places[numbers].argsort()]]
    runs: list[range] = []
    for number in ordered:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def _cut(tensor: QuantizedTensor, parts: Sequence[Part]) -> QuantizedTensor:
    """Rows and columns of every expert of a stack, those of several parts one below the other."""
    shares = []
    for part in parts:
        share = packed.rows_of(tensor, part.first, part.stop)
        if (part.left, part.right) != (0, tensor.shape[2]):
            share = packed.columns_of(share, part.left, part.right)
        shares.append(share)
    joined = packed.join_rows(shares)
    assert joined is not None  # they were cut from one tensor
    return joined


def _stacked(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """The experts of several stacks as one stack."""
    if len(tensors) == 1:
        return tensors[0]
    parts = [packed.parts_of(tensor) for tensor in tensors]
    return packed.tensor_of(tensors[0].format, {name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
