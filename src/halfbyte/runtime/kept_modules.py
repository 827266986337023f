"""Kept linear layers of a packed model: BF16 and FP16 matrices, which torch reads at a third of the memory's speed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from halfbyte.runtime.ops import run_linear
from halfbyte.runtime.packed import PackedDense, pack_dense
from halfbyte.runtime.remote.halfbyte_modules import QuantizedWeights

ROWS = 8
"""From so many rows of activations on torch's own product is the faster one."""
_NUMPY_VIEWS = {torch.bfloat16: torch.uint16, torch.float16: torch.float16}


class KeptLinear(nn.Linear):
    """Mixed into a linear layer's class: a few rows of activations are multiplied by the compiled product."""

    _kept: tuple[int, PackedDense] | None
    _dense_class: type

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product with [..., K]."""
        weight = self.weight
        few = input.numel() <= ROWS * weight.shape[1]
        fits = input.dtype == weight.dtype and weight.dtype in _NUMPY_VIEWS and weight.device.type == "cpu"
        if not few or not fits or torch.compiler.is_compiling():
            return nn.functional.linear(input, weight, self.bias)
        if self._kept is None or self._kept[0] != weight.data_ptr():
            self._kept = (weight.data_ptr(), product_of_parameter(weight, self.bias))
        return run_linear(input, self._kept[1])


def product_of_parameter(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedDense:
    """Return the product with a parameter [N, K], whose memory is used as it is."""
    from ml_dtypes import bfloat16

    values = weight.detach().view(_NUMPY_VIEWS[weight.dtype]).numpy()
    values = values.view(bfloat16) if weight.dtype == torch.bfloat16 else values
    return pack_dense(values, None if bias is None else bias.detach().float().numpy())


@cache
def _kept_class(base: type) -> type:
    return type(f"Kept{base.__name__}", (KeptLinear, base), {})


def speed_up_kept(model: Any) -> None:
    """Give BF16 and FP16 linear layers of a model on the CPU the compiled product."""
    for module in model.modules():
        if isinstance(module, QuantizedWeights) or type(module).forward is not nn.Linear.forward:
            continue
        weight: Any = module._parameters.get("weight")
        if weight is not None and weight.device.type == "cpu" and weight.dtype in _NUMPY_VIEWS:
            module.__dict__.update(_kept=None, _dense_class=type(module))
            kind: Any = type(module)
            module.__class__ = _kept_class(kind)


def undo_kept(model: nn.Module) -> None:
    """Undo ``speed_up_kept``."""
    for module in model.modules():
        if isinstance(module, KeptLinear):
            module.__class__ = module._dense_class
            del module.__dict__["_kept"], module.__dict__["_dense_class"]
