"""Mixtures of experts in transformers: the experts implementation ``halfbyte``, which calls the compiled products."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from halfbyte.formats import QuantizedTensor
from halfbyte.runtime.ops import handle_of, run_experts
from halfbyte.runtime.packed import NoKernelError, PackedExperts, pack_experts
from halfbyte.runtime.packed_modules import pack_parameter
from halfbyte.runtime.products import Mode, PackedStack

IMPLEMENTATION = "halfbyte"
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_WIDTH = 16


def pack_mixture(module: Any, gate_up: QuantizedTensor, down: QuantizedTensor, mode: Mode) -> None:
    """Give a module of experts its packed weights; NoKernelError where it computes in a way that is not known."""
    settings = settings_of(module)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    biases = {}
    if module.has_bias:
        biases = {"gate_up_bias": _values(module, f"{first}_bias"), "down_bias": _values(module, "down_proj_bias")}
    mixture = pack_experts(gate_up, down, **biases, **settings)
    pack_parameter(module, first, PackedStack(mixture.gate_up))
    pack_parameter(module, "down_proj", PackedStack(mixture.down))
    module.__dict__.update(_mixture=mixture, _mode=mode, _handle=handle_of(mixture))


def _values(module: Any, name: str) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = module.get_parameter(name).detach().float().numpy()
    return values


def settings_of(module: Any) -> dict[str, Any]:
    """The settings of PackedExperts that compute what a module's gate computes; NoKernelError where none do.

    The module's own gate is tried on numbers, so that neither its class nor its source has to be known.
    """
    if not all(hasattr(module, flag) for flag in _FLAGS) or getattr(module, "has_post_expert_norm", False):
        raise NoKernelError(f"{type(module).__name__} is no mixture of experts as transformers declares them")
    limits = {"limit": float(getattr(module, "limit", 7.0)), "alpha": float(getattr(module, "alpha", 1.702))}
    x = torch.linspace(-12, 12, 8 * 2 * _WIDTH).reshape(8, -1)
    x = x[:, torch.randperm(2 * _WIDTH, generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        try:
            wanted = module._apply_gate(x) if module.has_gate else module.act_fn(x[:, :_WIDTH])
        except Exception as error:  # a gate of another kind of module may want anything
            raise NoKernelError(f"the gate of {type(module).__name__} cannot be tried ({error})") from error
        for interleaved in (False, True) if module.has_gate else (False,):
            for activation in ("silu", "gelu_tanh", "clamped_swiglu", "relu2", "identity"):
                result = _gated(x, activation, interleaved, limits) if module.has_gate else _alone(x, activation)
                if result is not None and result.shape == wanted.shape and torch.allclose(result, wanted, 1e-5, 1e-5):
                    return {"activation": activation, "gated": module.has_gate, "interleaved": interleaved, **limits}
    raise NoKernelError(f"the activation of {type(module).__name__} has no compiled product")


def _gated(x: torch.Tensor, activation: str, interleaved: bool, limits: dict[str, float]) -> torch.Tensor | None:
    gate, up = (x[:, ::2], x[:, 1::2]) if interleaved else x.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=limits["limit"]), up.clamp(-limits["limit"], limits["limit"])
        return (up + 1) * gate * torch.sigmoid(limits["alpha"] * gate)
    return _activated(gate, activation) * up


def _alone(x: torch.Tensor, activation: str) -> torch.Tensor | None:
    return None if activation == "clamped_swiglu" else _activated(x[:, :_WIDTH], activation)


def _activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return nn.functional.silu(x)
    if activation == "gelu_tanh":
        return nn.functional.gelu(x, approximate="tanh")
    return nn.functional.relu(x).square() if activation == "relu2" else x


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute a mixture by the compiled product where its weights are packed, else by its class's own loop."""
    mixture: PackedExperts | None = module.__dict__.get("_mixture")
    if mixture is None:
        result: torch.Tensor = type(module).forward.__wrapped__(module, hidden_states, top_k_index, top_k_weights)
        return result
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    chosen, shares = (t.reshape(len(x), -1) for t in (top_k_index, top_k_weights))
    mode = module._mode.name
    if torch.compiler.is_compiling():
        y = torch.ops.halfbyte.experts(x, chosen, shares, module._handle, mixture.n, mode)
    else:
        y = run_experts(x, chosen, shares, mixture, mode)
    return y.reshape(hidden_states.shape)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
