"""The largest keys and values of attention layers, as a KV cache would hold them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import DynamicCache

_CACHE = "past_key_values"


class _Largest(DynamicCache):
    """Takes the place of a cache: notes the largest magnitude of what it is to hold, and holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[str, torch.Tensor] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keys are normalised and rotated by now, and neither is repeated for the heads that share it."""
        for kind, states in (("keys", key_states), ("values", value_states)):
            largest = states.abs().amax().float()
            known = self.largest.get(kind)
            self.largest[kind] = largest if known is None else torch.maximum(known, largest)
        return key_states, value_states


@contextlib.contextmanager
def watch_caches(attentions: Mapping[str, nn.Module]) -> Iterator[dict[str, _Largest]]:
    """Within this context attention modules (by name) see a cache, without any change of what they compute.

    Modules that are not called with a cache, or put nothing into it as they use another layer's, stay unseen.
    """
    caches = {name: _Largest() for name in attentions}

    def hook(cache: _Largest) -> Any:
        def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return (args, {**kwargs, _CACHE: cache}) if _CACHE in kwargs else None

        return give

    handles = [m.register_forward_pre_hook(hook(caches[n]), with_kwargs=True) for n, m in attentions.items()]
    try:
        yield caches
    finally:
        for handle in handles:
            handle.remove()


def arrays_of(caches: Mapping[str, _Largest]) -> dict[str, dict[str, NDArray[np.float32]]]:
    """FP32 [] by module, then ``keys`` and ``values``; only what was seen."""
    return {
        name: {kind: value.cpu().numpy() for kind, value in cache.largest.items()}
        for name, cache in caches.items()
        if cache.largest
    }
