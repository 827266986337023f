"""Mixtures of experts on a device with weights that stay in 4 bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from halfbyte.errors import FormatError, HalfbyteError
from halfbyte.formats import QuantizedTensor
from halfbyte.gpu.device_weight import DeviceWeight
from halfbyte.gpu.expert_kernel import down_kernel, gate_up_kernel, slot_sum_kernel
from halfbyte.kernels.linear import NoKernelError

ACTIVATIONS = ("silu", "gelu_tanh", "clamped_swiglu")
_STRIPS, _WARPS, _STAGES, _SUM_COLUMNS = 2, 2, 3, 256


class SortedSlots(NamedTuple):
    """Slots of all tokens in tiles of one expert each: ``places`` [tiles * tokens], -1 where a tile is not full.

    ``tile_experts`` [tiles]: the expert of each tile, the number of experts for tiles that are empty.
    """

    places: torch.Tensor
    tile_experts: torch.Tensor


def tiles_of(slots: int, experts: int, tokens: int) -> int:
    """Tiles that suffice for so many slots, however they are spread over the experts."""
    return slots // tokens + min(slots, experts)


def sort_slots(chosen: torch.Tensor, experts: int, tokens: int) -> SortedSlots:
    """Sort slots by their expert into tiles of ``tokens``; numbers that are no expert's have no place.

    Shapes depend on those of the arguments alone, and nothing waits for the device.
    """
    flat = chosen.reshape(-1).to(torch.int64)
    count, device = flat.numel(), flat.device
    valid = (flat >= 0) & (flat < experts)
    key = torch.where(valid, flat, experts)
    order = torch.argsort(key, stable=True)
    sizes = torch.zeros(experts + 1, dtype=torch.int64, device=device).scatter_add_(0, key, torch.ones_like(key))
    padded = torch.div(sizes[:experts] + tokens - 1, tokens, rounding_mode="floor")
    ends = torch.cumsum(padded, 0)
    before = torch.cumsum(sizes, 0) - sizes
    sorted_key = key[order]
    tiles = tiles_of(count, experts, tokens)
    starts = torch.cat([(ends - padded) * tokens, torch.full((1,), tiles * tokens, device=device)])
    position = starts[sorted_key] + torch.where(
        sorted_key < experts, torch.arange(count, device=device) - before[sorted_key], 0
    )
    places = torch.full((tiles * tokens + 1,), -1, dtype=torch.int32, device=device)
    places.scatter_(0, position, order.to(torch.int32))
    numbers = torch.searchsorted(ends, torch.arange(tiles, device=device), right=True)
    return SortedSlots(places[:-1].contiguous(), numbers.to(torch.int32))


class DeviceExperts:
    """The sum over each token's slots of share * down(activation(gate) * up), on a device.

    ``gate_up`` [E, 2W, K], gates first or ``interleaved`` with up; ``down`` [E, N, W]; W a multiple of 16. Biases
    [E, 2W] (in the order of ``gate_up``) and [E, N]. Slots are added in their order. NoKernelError for weights or
    activations without a product on GPUs.
    """

    def __init__(
        self,
        gate_up: QuantizedTensor,
        down: QuantizedTensor,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        *,
        activation: str = "silu",
        gated: bool = True,
        interleaved: bool = False,
        limit: float = 7.0,
        alpha: float = 1.702,
        device: torch.device | str = "cuda",
    ) -> None:
        if activation not in ACTIVATIONS or not gated:
            raise NoKernelError(f"the activation {activation!r} has no product on GPUs")
        if len(gate_up.shape) != 3 or len(down.shape) != 3:
            raise NoKernelError("experts need stacks of matrices [experts, rows, columns]")
        self.width = gate_up.shape[1] // 2
        if gate_up.shape != (down.shape[0], 2 * down.shape[2], gate_up.shape[2]):
            shapes = f"{list(gate_up.shape)} and {list(down.shape)}"
            raise FormatError(f"gate_up and down of shapes {shapes} are not of the same experts")
        if self.width % 16:
            raise NoKernelError(f"experts of width {self.width}, no multiple of 16, have no product on GPUs")
        if interleaved:
            gate_up, gate_up_bias = _gates_first(gate_up), _bias_gates_first(gate_up_bias)
        self.gate_up, self.down = DeviceWeight(gate_up, device), DeviceWeight(down, device)
        self.count, self.n, self.k = gate_up.shape[0], down.shape[1], gate_up.shape[2]
        self.activation, self.limit, self.alpha = activation, limit, alpha
        self.gate_up_bias = None if gate_up_bias is None else gate_up_bias.contiguous().to(device)
        self.down_bias = None if down_bias is None else down_bias.contiguous().to(device)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights on the device."""
        return self.gate_up.nbytes + self.down.nbytes

    def __call__(self, x: torch.Tensor, experts: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """The same as ``run_on_device``."""
        return self.run_on_device(x, experts, shares)

    def run_on_device(self, x: torch.Tensor, experts: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return the sums for x [T, K], numbers of experts [T, slots] and their shares [T, slots], as [T, N].

        Slots whose number is no expert's add nothing.
        """
        if x.ndim != 2 or x.shape[1] != self.k or experts.shape != shares.shape or len(experts) != len(x):
            shapes = f"{list(x.shape)}, {list(experts.shape)} and {list(shares.shape)}"
            raise HalfbyteError(f"x, experts and shares must be [T, {self.k}], [T, slots] and [T, slots], not {shapes}")
        y = torch.empty((len(x), self.n), dtype=x.dtype, device=x.device)
        if not y.numel():
            return y
        slots = experts.shape[1]
        tokens = tokens_per_tile(experts.numel(), self.count)
        order = sort_slots(experts, self.count, tokens)
        hidden = torch.empty((len(order.places), self.width), dtype=x.dtype, device=x.device)
        by_slot = torch.empty((experts.numel(), self.n), dtype=torch.float32, device=x.device)
        self._run_gate_up(x.contiguous(), hidden, order, slots, tokens)
        self._run_down(hidden, by_slot, order, tokens)
        slot_sum_kernel[(len(x), -(-self.n // _SUM_COLUMNS))](
            by_slot, experts.contiguous(), shares.contiguous(), y, slots, self.n, self.count, COLUMNS=_SUM_COLUMNS,
            enable_fp_fusion=True,
        )  # fmt: skip
        return y

    def _run_gate_up(self, x: torch.Tensor, hidden: torch.Tensor, order: SortedSlots, slots: int, tokens: int) -> None:
        weight, bias = self.gate_up, self.gate_up_bias
        gate_up_kernel[(-(-self.width // (_STRIPS * 16)), len(order.tile_experts))](
            x, weight.words, weight.scales, weight.factors, hidden if bias is None else bias, hidden, *order,
            weight.tables, weight.scale_values, slots, self.width, self.k, weight.strips, weight.tiles, self.count,
            self.limit, self.alpha, **_constants(weight, x, tokens, bias), ACTIVATION=self.activation,
        )  # fmt: skip

    def _run_down(self, hidden: torch.Tensor, by_slot: torch.Tensor, order: SortedSlots, tokens: int) -> None:
        weight, bias = self.down, self.down_bias
        down_kernel[(-(-weight.strips // _STRIPS), len(order.tile_experts))](
            hidden, weight.words, weight.scales, weight.factors, hidden if bias is None else bias, by_slot, *order,
            weight.tables, weight.scale_values, self.n, self.width, weight.strips, weight.tiles, self.count,
            **_constants(weight, hidden, tokens, bias),
        )  # fmt: skip


def tokens_per_tile(slots: int, experts: int) -> int:
    """Tokens of a tile, by the slots that an expert has on average."""
    average = slots / experts
    return 8 if average <= 8 else 16 if average <= 16 else 32


def _constants(weight: DeviceWeight, x: torch.Tensor, tokens: int, bias: torch.Tensor | None) -> dict[str, Any]:
    launch = {"TOKENS": tokens, "BIAS": bias is not None, "WHOLE": weight.k % 128 == 0, "STAGES": _STAGES}
    return {**weight.settings(x.dtype, _STRIPS), **launch, "num_warps": _WARPS}


def _gates_first(stack: QuantizedTensor) -> QuantizedTensor:
    """A stack whose rows are gate and up in turn, with all gates first."""
    order = np.concatenate([np.arange(0, stack.shape[1], 2), np.arange(1, stack.shape[1], 2)])
    return replace(stack, codes=stack.codes[:, order], scales=stack.scales[:, order])


def _bias_gates_first(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=1)
