"""One step of a layer, rounded: its weights refitted to what the quantized model feeds them, then encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from halfbyte.calibrate.layer_steps import Group, Step
from halfbyte.calibrate.refit import InputSums, chunks, objective
from halfbyte.calibrate.two_streams import Shelf, tokens_of
from halfbyte.calibration.statistics import Statistics
from halfbyte.calibration.token_counts import MIN_TOKENS
from halfbyte.checkpoint import Reader
from halfbyte.convert.encode_target import InputHessian, Target, encode_targets
from halfbyte.errors import MeasurementError, PlanError
from halfbyte.formats import QuantizedTensor, stacked
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.shards import Item

ROWS = 4096  # of a file at a time
Floats = NDArray[np.float32]
Uses = Mapping[str, Sequence[tuple[str, int | None]]]
"""Weights of the checkpoint, and experts of them, that each parameter of the model holds."""


@dataclass
class Rounded:
    """A weight that was rounded: its codes, its objective ([2] or [E, 2]), and what its inputs sum up to."""

    tensor: QuantizedTensor
    objective: NDArray[np.float64]
    count: NDArray[np.int64]
    squares: NDArray[np.float64]
    amax: NDArray[np.float32]


@dataclass
class _Inputs:
    """Where the inputs of a weight lie: rows of a file, the tokens they belong to, and what outputs are multiplied by.

    ``rows`` and ``tokens`` None: all, in order.
    """

    name: str
    count: int
    rows: NDArray[np.int64] | None = None
    tokens: NDArray[np.int64] | None = None
    factor: Floats | None = None


class StepRounder:
    """Rounds the weights of steps; ``items`` by name have the methods that the recipe wants.

    ``gradients`` holds sums over the gradients at their outputs, where the recipe asks for them.
    """

    def __init__(
        self,
        plan: Plan,
        items: Mapping[str, Item],
        uses: Uses,
        reader: Reader,
        device: torch.device,
        gradients: Statistics | None = None,
    ) -> None:
        self.plan, self.items, self.uses, self.reader, self.device = plan, items, uses, reader, device
        self.gradients = gradients

    def round(self, step: Step, shelf: Shelf) -> dict[str, Rounded]:
        """Round all weights of a step whose rows are in the shelf; by name."""
        done: dict[str, Rounded] = {}
        targets: list[tuple[Target, InputSums]] = []
        stacks: list[tuple[Item, Group, int]] = []
        writers: list[tuple[int, Callable[[], None]]] = []
        results: dict[str, list[tuple[QuantizedTensor, tuple[float, float], InputSums] | None]] = {}
        for group in step.groups:
            for item in self._items(group):
                if group.experts:
                    results[item.weight.name] = [None] * item.weight.shape[0]
                    stacks += [(item, group, expert) for expert in range(item.weight.shape[0])]
            if not group.experts and step.sum is None:
                targets += self._read_together(group, shelf)
        for item, group, expert in stacks:
            tokens, places = tokens_of(shelf, group, expert)
            if step.sum is None:
                results[item.weight.name][expert] = self._expert(item, group, expert, tokens, places, shelf)
            else:
                weights = shelf.routes[group.experts][1].ravel()[places] * np.float32(group.scale or 0)
                inputs = _Inputs(f"xh {group.targets[0]}", len(places), places, tokens, weights)
                slot = results[item.weight.name]
                writers.append((len(tokens), self._later(item, expert, inputs, shelf, slot)))
        if step.sum is not None:
            for group in step.groups:
                for item in self._items(group) if not group.experts else ():
                    factor = shelf.factors.get(group.targets[0], np.ones(shelf.tokens, np.float32))
                    inputs = _Inputs(
                        f"xh {group.targets[0]}", shelf.tokens, factor=factor * np.float32(group.scale or 0)
                    )
                    results[item.weight.name] = [None]
                    writers.append((shelf.tokens, self._later(item, None, inputs, shelf, results[item.weight.name])))
            # most tokens first: what is left of the error is for those that follow
            for _, write in sorted(writers, key=lambda entry: -entry[0]):
                write()
        done |= self._encode_together(targets)
        for name, parts in results.items():
            done[name] = _joined(self.items[name], [part for part in parts if part is not None])
        return done

    def _items(self, group: Group) -> Iterator[Item]:
        """The items that a group's parameters hold, once each."""
        names = dict.fromkeys(name for target in group.targets for name, _ in self.uses.get(target, ()))
        return (self.items[name] for name in names if name in self.items)

    def _read_together(self, group: Group, shelf: Shelf) -> list[tuple[Target, InputSums]]:
        """Targets of the matrices that read one input."""
        items = list(self._items(group))
        if not items:
            return []
        target = group.targets[0]
        refit = f"x {target}" in shelf.files
        sums = self._sums(_Inputs(f"xh {target}", shelf.tokens), shelf, f"x {target}" if refit else None, None)
        hessian = self._hessian(sums, items[0])
        correction = sums.correction(expert=False)
        made = []
        for item in items:
            values = self._values(item)
            if item.method is not None and correction is not None:
                values = _refitted(values, _times(values, correction))
            made.append((Target(item, values, hessian if item.method else None, self._output(item)), sums))
        return made

    def _encode_together(self, targets: Sequence[tuple[Target, InputSums]]) -> dict[str, Rounded]:
        """Encode matrices, those of one fusion group with one global scale."""
        groups: dict[str, list[tuple[Target, InputSums]]] = {}
        for target, sums in targets:
            weight, fmt = target.item.weight, target.item.format
            shares = fmt is not None and fmt.shares_scale and weight.group
            groups.setdefault(weight.group if shares and weight.group else f"={weight.name}", []).append((target, sums))
        done = {}
        for name, members in groups.items():
            self._check_whole(name, [t.item.weight.name for t, _ in members])
            tensors = encode_targets(self.plan, [target for target, _ in members])
            for (target, sums), tensor in zip(members, tensors, strict=True):
                found = self._judged(target, tensor)
                done[target.item.weight.name] = _joined(target.item, [(tensor, found, sums)])
        return done

    def _check_whole(self, group: str, names: Sequence[str]) -> None:
        """A fusion group has one global scale, so all of it must come in one step."""
        missing = [n for n, i in self.items.items() if i.weight.group == group and n not in names]
        if missing:
            raise PlanError(
                f"{missing[0]} shares a global scale with {names[0]}, but does not read the same input, so "
                "`target: residual` cannot round them together; leave it out of the recipe"
            )

    def _expert(
        self, item: Item, group: Group, expert: int, tokens: NDArray[np.int64], places: NDArray[np.int64], shelf: Shelf
    ) -> tuple[QuantizedTensor, tuple[float, float], InputSums]:
        """One expert that reads hidden states, or in a model whose writers cannot be refitted, any other."""
        if group.inner:
            inputs, source = _Inputs(f"xh {group.targets[0]}", len(places), places, tokens), None
        else:
            inputs, source = _Inputs(f"xh {group.targets[0]}", len(tokens), tokens, tokens), f"x {group.experts}"
        sums = self._sums(inputs, shelf, source, None)
        values = self._values(item, expert)
        hessian = None
        if item.method is not None and sums.count >= MIN_TOKENS:
            hessian = self._hessian(sums, item)
            correction = sums.correction(expert=True)
            values = values if correction is None else _refitted(values, _times(values, correction))
        target = Target(item, values, hessian, self._output(item, expert))
        tensor = encode_targets(self.plan, [target])[0]
        return tensor, self._judged(target, tensor), sums

    def _later(
        self,
        item: Item,
        expert: int | None,
        inputs: _Inputs,
        shelf: Shelf,
        results: list[tuple[QuantizedTensor, tuple[float, float], InputSums] | None],
    ) -> Callable[[], None]:
        """The work on one writer, which waits for its turn."""

        def write() -> None:
            original = self._values(item, expert)
            sums = self._sums(inputs, shelf, None, len(original))
            values, hessian = original, None
            if item.method is not None and sums.count >= MIN_TOKENS:
                hessian = self._hessian(sums, item)
                correction = sums.correction(expert=expert is not None)
                values = original if correction is None else _refitted(original, correction)
            target = Target(item, values, hessian, self._output(item, expert))
            tensor = encode_targets(self.plan, [target])[0]
            results[expert or 0] = tensor, self._judged(target, tensor), sums
            self._take_out(inputs, shelf, _matrix(tensor) - original)

        return write

    def _take_out(self, inputs: _Inputs, shelf: Shelf, change: Floats) -> None:
        """What a writer adds to the stream now, other than before, out of ρ."""
        rho = shelf.files["rho"]
        moved = torch.from_numpy(change).to(self.device)
        for x, tokens, factor in self._rows(inputs, shelf):
            added = (x @ moved.T) * (1.0 if factor is None else factor[:, None])
            rho.add(tokens, -added.cpu().numpy())

    def _sums(self, inputs: _Inputs, shelf: Shelf, source: str | None, rows: int | None) -> InputSums:
        """Sums over the inputs; beside them x - x̂, with ``source`` the name of x, or ρ where there are ``rows``."""
        columns = shelf.files[inputs.name].width if inputs.name in shelf.files else 0
        sums = InputSums.zeros(columns, rows if rows is not None else columns if source else None, self.device)
        for x, tokens, factor in self._rows(inputs, shelf):
            other = None
            if rows is not None:
                other = self._take(shelf, "rho", tokens)
            elif source is not None:
                other = self._take(shelf, source, tokens) - x
            sums.add(x, other, factor)
        if not sums.finite:
            raise MeasurementError(
                f"the inputs of {inputs.name.partition(' ')[2]}, or their squares, are not finite, so they say "
                "nothing; repair the checkpoint"
            )
        return sums

    def _take(self, shelf: Shelf, name: str, rows: slice | NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(shelf.files[name].take(rows)).to(self.device)

    def _rows(
        self, inputs: _Inputs, shelf: Shelf
    ) -> Iterator[tuple[torch.Tensor, slice | NDArray[np.int64], torch.Tensor | None]]:
        """Inputs [T, K] piece by piece, their tokens, and the factors [T] of their outputs."""
        for some in chunks(inputs.count, ROWS):
            rows = some if inputs.rows is None else inputs.rows[some]
            tokens = some if inputs.tokens is None else inputs.tokens[some]
            factor = None if inputs.factor is None else torch.from_numpy(inputs.factor[some]).to(self.device)
            yield self._take(shelf, inputs.name, rows), tokens, factor

    def _hessian(self, sums: InputSums, item: Item) -> InputHessian | None:
        return InputHessian(sums.mean()) if sums.count >= MIN_TOKENS else None

    def _output(self, item: Item, expert: int | None = None) -> Floats | None:
        wanted = item.method is not None and item.method.output is not None and self.gradients is not None
        return self.gradients.output_hessian(item.weight.name, expert) if wanted and self.gradients else None

    def _values(self, item: Item, expert: int | None = None) -> Floats:
        """The weight as the source has it, FP32 [N, K]."""
        at = (0, None) if expert is None else (expert, expert + 1)
        values = self.plan.checkpoint.read(self.reader, item.weight, *at).astype(np.float32)
        return np.asarray(values if expert is None else values[0])

    def _judged(self, target: Target, tensor: QuantizedTensor) -> tuple[float, float]:
        if target.hessian is None:
            return 0.0, 0.0
        return objective(_matrix(tensor) - target.values, target.values, target.hessian.values)


def _matrix(tensor: QuantizedTensor) -> Floats:
    values = tensor.decode()
    return np.asarray(values[0] if values.ndim > 2 else values)


def _times(values: Floats, correction: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(correction) @ correction


def _refitted(values: Floats, change: torch.Tensor) -> Floats:
    return np.asarray(values + change.float().cpu().numpy(), np.float32)


def _joined(item: Item, parts: Sequence[tuple[QuantizedTensor, tuple[float, float], InputSums]]) -> Rounded:
    """The parts of a weight: the experts of a stack, or the matrix alone."""
    stack = len(item.weight.shape) > 2
    tensors, objectives, sums = zip(*parts, strict=True)
    numbers = [
        np.array(objectives),
        [s.count for s in sums],
        [s.squares.cpu().numpy() for s in sums],
        [s.amax for s in sums],
    ]
    found, count, squares, amax = (np.asarray(n) if stack else np.asarray(n)[0] for n in numbers)
    return Rounded(
        stacked(tensors) if stack else tensors[0],
        np.asarray(found, np.float64),
        np.asarray(count, np.int64),
        np.asarray(squares, np.float64),
        np.asarray(amax, np.float32),
    )
