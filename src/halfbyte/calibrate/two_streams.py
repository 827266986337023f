"""Rows that two runs of a layer leave behind: inputs of its matrices in the source and in the quantized model.

They lie in files, so that the layer's weights and sums of one matrix at a time are all that is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from halfbyte.calibrate.layer_steps import OUTPUT, Group, Step
from halfbyte.calibrate.layerwise import Arguments, as_numpy
from halfbyte.calibrate.states import States
from halfbyte.calibrate.taps import StopLayer, Taps, experts_modules
from halfbyte.errors import HalfbyteError


@dataclass
class Batch:
    """Samples that run through a layer together: rows of the state files, hidden states, and the layer's call."""

    rows: slice
    hidden: torch.Tensor
    call: Arguments


Batches = Callable[[], Iterator[Batch]]


class Shelf:
    """Files of rows by name in a folder; ``routes``: experts [T, k] and weights [T, k] by module of experts."""

    def __init__(self, folder: Path, tokens: int) -> None:
        self.folder, self.tokens = folder, tokens
        self.files: dict[str, States] = {}
        self.routes: dict[str, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}
        self.factors: dict[str, NDArray[np.float32]] = {}

    def put(self, name: str, rows: slice, values: torch.Tensor) -> None:
        """Keep rows [T, K] under a name."""
        if name not in self.files:
            path = self.folder / f"rows-{len(self.files):03d}.f32"
            path.write_bytes(b"")
            self.files[name] = States(path, values.shape[-1])
        self.files[name].write(rows, as_numpy(values))

    def route(self, name: str, rows: slice, index: torch.Tensor, weights: torch.Tensor) -> None:
        """Keep which experts a module sends tokens to, and what it multiplies their outputs by."""
        chosen = index.reshape(rows.stop - rows.start, -1)
        if name not in self.routes:
            shape = self.tokens, chosen.shape[1]
            self.routes[name] = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        self.routes[name][0][rows] = chosen.cpu().numpy()
        self.routes[name][1][rows] = as_numpy(weights.reshape(chosen.shape))

    def factor(self, name: str, rows: slice, factor: Any) -> None:
        """Keep what a module's output is multiplied by, for each token."""
        kept = self.factors.setdefault(name, np.ones(self.tokens, np.float32))
        kept[rows] = as_numpy(factor.reshape(-1)) if isinstance(factor, torch.Tensor) else float(factor)

    def clear(self) -> None:
        """Remove the files."""
        for states in self.files.values():
            states.path.unlink(missing_ok=True)
        self.files, self.routes, self.factors = {}, {}, {}


def run_source(
    layer: nn.Module,
    parameters: dict[str, nn.Parameter],
    steps: list[Step],
    batches: Batches,
    shelf: Shelf,
    done: Callable[[Batch, torch.Tensor], None],
    dtype: torch.dtype,
) -> None:
    """Run the source's layer over all batches: x of what reads an input, s behind what writes to the stream.

    ``done`` takes the layer's output of each batch.
    """
    readers = {g.targets[0]: g for step in steps if step.sum is None for g in step.groups}
    modules = {g.experts for g in readers.values() if g.experts and not g.inner}
    places = {step.sum: f"s {step.sum}" for step in steps if step.sum is not None}
    for batch in batches():
        taps = Taps(parameters, dtype)
        rows = batch.rows

        def keep(name: str, expert: int | None, x: torch.Tensor, rows: slice = rows) -> None:
            if name in readers and expert is None:
                shelf.put(f"x {name}", rows, x.reshape(-1, x.shape[-1]))

        def keep_routed(
            name: str, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, rows: slice = rows
        ) -> None:
            if name in modules:
                shelf.put(f"x {name}", rows, hidden.reshape(-1, hidden.shape[-1]))

        def keep_sum(number: int, s: torch.Tensor, rows: slice = rows) -> None:
            if number in places:
                shelf.put(places[number], rows, s.reshape(-1, s.shape[-1]))

        taps.on_input, taps.on_routes, taps.on_sum = keep, keep_routed, keep_sum
        output = taps.run(layer, batch.hidden, batch.call)
        assert output is not None
        if OUTPUT in places:
            shelf.put(places[OUTPUT], rows, output.reshape(-1, output.shape[-1]))
        done(batch, output)


def run_quantized(
    layer: nn.Module,
    parameters: dict[str, nn.Parameter],
    step: Step,
    batches: Batches,
    shelf: Shelf,
    dtype: torch.dtype,
) -> None:
    """Run the layer, as far as it is quantized, up to a step: x̂ of its matrices and, behind writers, what ρ is.

    ρ is left under the name ``rho``, the inputs of a group under ``xh`` and its first parameter.
    """
    for batch in batches():
        _Pass(layer, parameters, step, batch, shelf, dtype).go()


class _Pass:
    """One batch on its way to a step."""

    def __init__(
        self,
        layer: nn.Module,
        parameters: dict[str, nn.Parameter],
        step: Step,
        batch: Batch,
        shelf: Shelf,
        dtype: torch.dtype,
    ) -> None:
        self.layer, self.step, self.batch, self.shelf = layer, step, batch, shelf
        self.groups = {g.targets[0]: g for g in step.groups}
        self.modules = {g.experts: g for g in step.groups if g.experts}
        self.left = {n for n, g in self.groups.items() if not g.experts} | set(self.modules)
        self.inner = {g.targets[0] for g in step.groups if g.inner}
        self.owners = experts_modules(layer, parameters)
        self.taps = Taps(parameters, dtype)
        self._routed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rows: dict[str, torch.Tensor] = {}

    def go(self) -> None:
        taps = self.taps
        taps.on_input, taps.on_routes = self._input, self._routes
        taps.on_factor, taps.on_sum = self._factor, self._sum
        output = taps.run(self.layer, self.batch.hidden, self.batch.call)
        if output is not None and self.step.sum == OUTPUT:
            self._error(output)
        for name, rows in self._rows.items():
            group = self.groups[name]
            each = self.shelf.routes[group.experts][0].shape[1]
            self.shelf.put(f"xh {name}", slice(self.batch.rows.start * each, self.batch.rows.stop * each), rows)

    def _input(self, name: str, expert: int | None, x: torch.Tensor) -> None:
        if expert is None:
            if name in self.groups:
                self.shelf.put(f"xh {name}", self.batch.rows, x.reshape(-1, x.shape[-1]))
                self._seen(name)
            return
        if name not in self.inner:
            self._check_order(name, expert, x)
            return
        module = self.groups[name].experts
        _, index = self._routed[module]
        place, token = torch.where(expert == index.T)
        if len(token) != len(x):
            raise _untraceable(module)
        if name not in self._rows:
            self._rows[name] = torch.zeros(index.numel(), x.shape[-1], device=x.device)
        self._rows[name][token * index.shape[1] + place] = x.float()

    def _check_order(self, name: str, expert: int, x: torch.Tensor) -> None:
        """Inputs of experts are followed by their order, which is looked at where they can be compared."""
        routed = self._routed.get(self.owners[name])
        if routed is not None and not any(name == other for other in self.groups):
            hidden, index = routed
            _, token = torch.where(expert == index.T)
            if hidden.shape[-1] == x.shape[-1] and (len(token) != len(x) or not torch.equal(hidden[token], x)):
                raise _untraceable(name)

    def _routes(self, name: str, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        group = self.modules.get(name)
        if group is None:
            return
        hidden = hidden.reshape(-1, hidden.shape[-1])
        chosen = index.reshape(len(hidden), -1)
        self._routed[name] = hidden, chosen
        self.shelf.route(name, self.batch.rows, chosen, weights)
        if not group.inner:
            self.shelf.put(f"xh {group.targets[0]}", self.batch.rows, hidden)
            self._seen(name)

    def _factor(self, name: str, factor: Any) -> None:
        if name in self.groups:
            self.shelf.factor(name, self.batch.rows, factor)

    def _sum(self, number: int, s: torch.Tensor) -> None:
        if number == self.step.sum:
            self._error(s)
            raise StopLayer

    def _error(self, s: torch.Tensor) -> None:
        values = as_numpy(s.reshape(-1, s.shape[-1]))
        before = self.shelf.files[f"s {self.step.sum}"].read(self.batch.rows)
        self.shelf.put("rho", self.batch.rows, torch.from_numpy(before - values))

    def _seen(self, name: str) -> None:
        self.left.discard(name)
        if not self.left and self.step.sum is None:
            raise StopLayer


def _untraceable(name: str) -> HalfbyteError:
    return HalfbyteError(
        f"the inputs of {name} do not come in the order of its routes, so `target: residual` cannot follow them; leave "
        "it out of the recipe"
    )


def tokens_of(shelf: Shelf, group: Group, expert: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens that the quantized model sends to an expert, and their places among all routes [T * k]."""
    index = shelf.routes[group.experts][0]
    places = np.flatnonzero(index.ravel() == expert)
    return places // index.shape[1], places
