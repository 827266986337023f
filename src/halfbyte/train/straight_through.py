"""What training changes in a model: weights that are rounded in the forward pass, and gradients that pass through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from halfbyte.formats import QuantizedTensor
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.shards import Item
from halfbyte.runtime.packed import ARRAYS
from halfbyte.train.rounding import Rounded, round_given, round_searched, unrotated_gradient

Floats = NDArray[np.float32]


class _StraightThrough(torch.autograd.Function):
    """Gives the rounded values; their gradient is the master's, but for elements beyond the ends of their block."""

    @staticmethod
    def forward(ctx: Any, master: torch.Tensor, weight: TrainedWeight) -> torch.Tensor:
        rounded = weight.rounded(master)
        ctx.rounded = rounded
        return torch.from_numpy(rounded.values).to(master.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        array = unrotated_gradient(ctx.rounded, as_array(gradient))
        return torch.from_numpy(array).to(gradient.device), None


class TrainedWeight(nn.Module):
    """The parametrization of one weight of a plan: rounds its master to codes and scales, and decodes them.

    ``tensor`` holds the codes and scales; its arrays are buffers, so the state dict has all that an export needs.
    With a ``search``, a plan and its item for the weight, scales are chosen anew in every forward pass, for which
    ``group`` are all weights that share the global scale, this one included. ``dtype`` is that of the model;
    ``transposed``: the model stores [..., K, N].
    """

    def __init__(
        self,
        name: str,
        tensor: QuantizedTensor,
        dtype: torch.dtype,
        transposed: bool = False,
        search: tuple[Plan, Item] | None = None,
    ) -> None:
        super().__init__()
        self.weight_name, self.dtype, self.transposed, self.search = name, dtype, transposed, search
        self._format, self._shape = tensor.format, tensor.shape
        self._types: dict[str, Any] = {}
        self.group: list[TrainedWeight] = [self]
        self.home: list[Any] = []  # where torch keeps the master; in a list, so that it is no part of this module
        self.enabled = True
        # rounded values that are used again; in lists, as they may be parameters of other modules
        self.fixed: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []
        self._keeps = False
        self._hooks: list[Any] = []
        for part in ARRAYS:
            array = getattr(tensor, part)
            if array is not None:
                self._types[part] = (array.dtype, array.shape)
                array = np.ascontiguousarray(array)
                self.register_buffer(part, torch.from_numpy(array.reshape(-1).view(np.uint8).copy()))

    @property
    def master(self) -> torch.Tensor:
        """What is trained: FP32 [..., N, K], in the space of the blocks."""
        master: torch.Tensor = self.home[0].original
        return master

    @property
    def tensor(self) -> QuantizedTensor:
        """Codes and scales of the last forward pass; its arrays are the buffers' memory where these are on the CPU."""
        arrays = {part: getattr(self, part).cpu().numpy().view(d).reshape(s) for part, (d, s) in self._types.items()}
        return QuantizedTensor(self._format, self._shape, **arrays)

    def rounded(self, master: torch.Tensor) -> Rounded:
        """Round a master [..., N, K] as the forward pass does, and keep its codes and scales."""
        array = as_array(master)
        if self.search is None:
            result = round_given(self.tensor, array)
        else:
            masters = [array if member is self else as_array(member.master) for member in self.group]
            result = round_searched(*self.search, array, masters)
        self._keep(result.tensor)
        return result

    def _keep(self, tensor: QuantizedTensor) -> None:
        parts = ("codes",) if self.search is None else tuple(self._types)
        for part in parts:
            array = np.ascontiguousarray(getattr(tensor, part))
            getattr(self, part).copy_(torch.from_numpy(array.reshape(-1).view(np.uint8)))

    def forward(self, master: torch.Tensor) -> torch.Tensor:
        """The values that an engine decodes, in the model's dtype and layout; the master's own while switched off."""
        known = self.fixed or self._kept
        if known:
            return known[0]
        values = _StraightThrough.apply(master, self) if self.enabled else master
        values = values.to(self.dtype)
        values = values.transpose(-1, -2) if self.transposed else values
        if self._keeps:
            self._kept = [values]
        return values

    def keep_while(self, module: nn.Module) -> None:
        """Round once in each call of the module, which may ask for its weight once per expert."""
        # methods, which a copy of the model takes along
        self._hooks = [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),
        ]

    def forget(self) -> None:
        """Undo ``keep_while``."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: Any) -> None:
        self._keeps, self._kept = True, []

    def _end(self, *_: Any) -> None:
        self._keeps, self._kept = False, []

    def final(self) -> QuantizedTensor:
        """Codes and scales of the master as it is now: what the next forward pass would see. Copies."""
        tensor = self.rounded(self.master).tensor
        arrays = {part: getattr(tensor, part).copy() for part in self._types}
        return replace(tensor, **arrays)


class StoredType(nn.Module):
    """The parametrization of a kept weight that is trained in FP32: rounds it to the type that its file has."""

    def __init__(self, name: str, stored: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight_name, self.stored, self.dtype = name, stored, dtype
        self.home: list[Any] = []

    @property
    def master(self) -> torch.Tensor:
        """What is trained."""
        master: torch.Tensor = self.home[0].original
        return master

    def forward(self, master: torch.Tensor) -> torch.Tensor:
        """The stored values in the model's dtype; gradients pass through."""
        # both steps are exact, as a rounded number is near its origin
        return (master + (master.detach().to(self.stored).float() - master.detach())).to(self.dtype)


def as_array(values: torch.Tensor) -> Floats:
    """A tensor as contiguous FP32 array on the CPU, without a copy where it is one."""
    return np.asarray(values.detach().to("cpu", torch.float32).contiguous().numpy())
