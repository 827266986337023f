"""Every token for every expert, so that rarely routed ones have data too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from halfbyte.calibrate.observe import Observer
from halfbyte.errors import HalfbyteError

_TOKENS = 256  # at a time: masks of experts x experts x tokens are made of them


@contextlib.contextmanager
def show_all_tokens(layer: nn.Module, observer: Observer) -> Iterator[None]:
    """Within this context the observer sees every expert with every token; the layer computes what it always does.

    ``observer.routed`` counts, by parameter, the tokens that the router sent to each expert.
    """
    handles = []
    for module in layer.modules():
        stacks = [n for n, p in observer.parameters.items() if p.dim() == 3 and _is_own(module, p)]
        if stacks:
            before, after = _hooks(observer, stacks)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_own(module: nn.Module, parameter: nn.Parameter) -> bool:
    return any(p is parameter for p in module.parameters(recurse=False))


def _hooks(observer: Observer, stacks: list[str]) -> tuple[Any, Any]:
    experts = observer.parameters[stacks[0]].shape[0]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        if len(given) != 3 or given[1].is_floating_point():
            raise HalfbyteError(
                f"{type(module).__name__} does not take hidden states, expert indices and their weights, so it cannot "
                "be made to show all tokens to all experts; calibrate without that option"
            )
        hidden, chosen = given[0], given[1]
        for tokens in hidden.reshape(-1, hidden.shape[-1]).split(_TOKENS):
            every = torch.arange(experts, device=tokens.device).expand(len(tokens), experts)
            module.forward(
                tokens, every, torch.full(every.shape, 1 / experts, device=tokens.device, dtype=tokens.dtype)
            )
        for name in stacks:
            counts = torch.bincount(chosen.flatten(), minlength=experts)[:experts]
            observer.routed[name] = observer.routed.get(name, 0) + counts
        observer.paused = True

    def after(module: nn.Module, args: Any, output: Any) -> None:
        observer.paused = False

    return before, after
