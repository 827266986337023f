"""Gradients at the outputs of a layer's matrices: the sums of gᵀg that weigh the errors of their rows.

They are gradients of the log-likelihood of tokens that were drawn from the model's own distribution, so that the sums
are its Fisher information. A few tokens can hold nearly all of it (the first of a text, a token with an embedding of
zeros), and then say nothing about the others: each token counts with at most ``CLIP`` times the median norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from halfbyte.calibrate.observe import Observer

CLIP = 4.0
"""Times the median norm of a module's gradients in a batch, to which larger ones are shortened."""
_TOP = 0.001  # of the tokens that are looked at for what they hold
_MUCH = 0.5


class GradientObserver(Observer):
    """Within this context gradients that flow back through products with the given parameters are kept.

    ``wanted``: names of those whose sums are collected. ``end_batch`` clips and adds up what a backward pass left in
    ``sums``: FP32 [N, N], or [E, N, N] for the experts of a stack.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], wanted: Iterable[str], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(parameters, lambda name, parameter: "", dtype)
        self.wanted = frozenset(wanted)
        self.outputs: dict[str, torch.Tensor] = {}
        self._seen: tuple[str, int | None] | None = None
        self._held: dict[str, list[tuple[int | None, torch.Tensor]]] = {}
        self._norms: dict[str, list[torch.Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what was asked, and listen to the gradient of a product."""
        self._seen = None
        result = super().__torch_function__(func, types, args, kwargs)
        if self._seen is not None and result.requires_grad:
            result.register_hook(partial(self._take, *self._seen))
        self._seen = None
        return result

    def _look(self, x: torch.Tensor, weight: torch.Tensor, turned: bool) -> None:
        name, expert = self._find(weight) if isinstance(weight, torch.Tensor) else (None, None)
        if name in self.wanted and weight.dim() == 2:
            self._seen = name, expert

    def _take(self, name: str, expert: int | None, gradient: torch.Tensor) -> None:
        self._held.setdefault(name, []).append((expert, gradient.detach().reshape(-1, gradient.shape[-1]).float()))

    def end_batch(self) -> None:
        """Add up the gradients of one backward pass; the median is that of all tokens of a module in it."""
        for name, held in self._held.items():
            norms = [gradient.norm(dim=1) for _, gradient in held]
            every = torch.cat(norms)
            self._norms.setdefault(name, []).append(every)
            some = every[every > 0]
            limit = CLIP * some.median() if len(some) else torch.zeros(())
            for (expert, gradient), norm in zip(held, norms, strict=True):
                clipped = gradient * (limit / norm.clamp(min=1e-38)).clamp(max=1.0)[:, None]
                self._sum(name, gradient.shape[1], gradient.device)[... if expert is None else expert] += (
                    clipped.T @ clipped
                )
        self._held.clear()

    def _sum(self, name: str, rows: int, device: torch.device) -> torch.Tensor:
        if name not in self.outputs:
            parameter = self.parameters[name]
            lead = parameter.shape[:1] if parameter.dim() == 3 else ()
            self.outputs[name] = torch.zeros((*lead, rows, rows), device=device)
        return self.outputs[name]

    def concentrated(self) -> dict[str, float]:
        """Modules of which one token in a thousand held more than half of the squared gradients, and their share."""
        shares = {}
        for name, norms in self._norms.items():
            squares = torch.cat(norms).double().square().sort(descending=True).values
            total = float(squares.sum())
            share = float(squares[: max(1, int(len(squares) * _TOP))].sum()) / total if total else 0.0
            if share > _MUCH:
                shares[name] = share
        return shares
