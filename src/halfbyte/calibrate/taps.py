"""What passes a layer while it runs: inputs of its matrices, factors of their outputs, sums of the residual stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from halfbyte.calibrate.layerwise import Arguments, run_layer
from halfbyte.calibrate.observe import Observer

_ADDS = {torch.add, *(getattr(torch.Tensor, n) for n in ("add", "add_", "__add__", "__radd__", "__iadd__"))}
_FACTORS = {torch.mul, *(getattr(torch.Tensor, n) for n in ("mul", "mul_", "__mul__", "__rmul__", "__imul__"))}


class StopLayer(Exception):  # noqa: N818
    """Ends the run of a layer that has shown all that was wanted."""


class Taps(Observer):
    """Within this context a layer shows what it does; the attributes say to whom.

    ``on_input(name, expert, x)``: the inputs x [..., K] of a matrix, before it is applied. ``on_factor(name, a)``: what
    its output, as it left the matrix, is multiplied by. ``on_sum(number, s)``: the sums that the layer adds up, counted
    from 0. ``on_routes(name, hidden, index, weights)``: what a module with stacks of experts is called with. ``noise``:
    a vector that is added to the outputs of the matrices in ``noisy``.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(parameters, lambda name, parameter: "", dtype)
        self.on_input: Callable[[str, int | None, torch.Tensor], None] | None = None
        self.on_factor: Callable[[str, Any], None] | None = None
        self.on_sum: Callable[[int, torch.Tensor], None] | None = None
        self.on_routes: Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None
        self.noise: torch.Tensor | None = None
        self.noisy: frozenset[str] = frozenset()
        self._sums_seen = 0
        self._now: str | None = None
        self._outputs: dict[int, tuple[str, torch.Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Show the operands, do what was asked, show the result."""
        if func in _FACTORS and self.on_factor and len(args) > 1:
            for output, factor in (args[:2], args[1::-1]):
                known = self._outputs.get(id(output))
                if known is not None:
                    self.on_factor(known[0], factor)
        self._now = None
        result = super().__torch_function__(func, types, args, kwargs)
        if self._now is not None:
            if self.noise is not None and self._now in self.noisy:
                result = result + self.noise
            if self.parameters[self._now].dim() == 2:
                # kept, so that no other tensor gets its address
                self._outputs[id(result)] = self._now, result
        elif func in _ADDS and self.on_sum and isinstance(result, torch.Tensor):
            self._sums_seen += 1
            self.on_sum(self._sums_seen - 1, result)
        return result

    def _look(self, x: torch.Tensor, weight: torch.Tensor, turned: bool) -> None:
        name, expert = self._find(weight) if isinstance(weight, torch.Tensor) else (None, None)
        if name is None or weight.dim() != 2:
            return
        self._now = name
        if self.on_input:
            self.on_input(name, expert, x)

    def run(self, layer: nn.Module, hidden: torch.Tensor, call: Arguments) -> torch.Tensor | None:
        """Run a layer in this context; its output, or None where it was stopped."""
        self._sums_seen, self._outputs = 0, {}
        try:
            with self._routes(layer), self:
                return run_layer(layer, hidden, call)
        except StopLayer:
            return None
        finally:
            self._outputs = {}
            self._picked.clear()

    @contextlib.contextmanager
    def _routes(self, layer: nn.Module) -> Iterator[None]:
        """Have the modules with stacks of experts show what they are called with."""
        handles = []
        for name, module in layer.named_modules():
            stacks = any(p.dim() == 3 for p in module.parameters(recurse=False))
            if stacks and self.on_routes:
                handles.append(module.register_forward_pre_hook(self._route_hook(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _route_hook(self, name: str) -> Any:
        def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            if self.on_routes and len(given) == 3 and not given[1].is_floating_point():
                self.on_routes(name, *given)

        return show


def experts_modules(layer: nn.Module, names: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """The module, by its name in the layer, of each stack [E, N, K] of parameters, by its name in the model."""
    owners = {id(p): name for name, module in layer.named_modules() for p in module.parameters(recurse=False)}
    return {name: owners[id(p)] for name, p in names.items() if p.dim() == 3 and id(p) in owners}
