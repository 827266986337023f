"""The steps in which a layer is quantized: what reads one input together, what writes to the residual stream last.

Nothing here knows a family. A short run shows which matrices read the same input, in which order, and by how much the
residual stream changes where noise is added to the output of a matrix: where that is the noise itself, times a factor,
the matrix writes to the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.calibrate.layerwise import Arguments
from halfbyte.calibrate.taps import Taps, experts_modules
from halfbyte.models.roles import bare_role

OUTPUT = -1
"""Stands for the layer's output among the numbers of its sums."""
_TOLERANCE = 2e-3  # of the noise; FP32 rounds far less
_NAMES = {"up": "into the MLP", "down": "out of the MLP"}
_LEVELS = {
    **{f"{kind}.{part}": "up" for kind in ("mlp", "shared_expert", "experts") for part in ("gate", "up", "gate_up")},
    **{f"{kind}.down": "down" for kind in ("mlp", "shared_expert", "experts")},
}


@dataclass(frozen=True)
class Group:
    """Parameters of the model that read one input.

    ``experts``: the module, by its name in the layer, whose stacks they are; "" for matrices. ``inner``: their input
    arises within that module. ``scale``: what the residual stream gets of their outputs, times what ``Taps`` shows;
    None where they do not write to it.
    """

    targets: tuple[str, ...]
    experts: str = ""
    inner: bool = False
    scale: float | None = None


@dataclass(frozen=True)
class Step:
    """Groups that are rounded before the next step's inputs are looked at.

    ``sum``: where the residual stream is complete behind what the groups write, as the number of a sum of the layer or
    OUTPUT; None where a group does not write to it.
    """

    groups: tuple[Group, ...]
    sum: int | None = None

    @property
    def targets(self) -> frozenset[str]:
        """Names of all parameters of the step."""
        return frozenset(t for group in self.groups for t in group.targets)


def find_steps(
    layer: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    roles: Mapping[str, str],
    wanted: Collection[str],
    hidden: torch.Tensor,
    call: Arguments,
    dtype: torch.dtype = torch.float32,
) -> list[Step]:
    """Find the steps of a filled layer from one run over ``hidden`` [B, L, D], and one more for each writer.

    ``parameters`` of the layer and their ``roles`` by name in the model; only groups with ``wanted`` ones are returned.
    """
    owners = experts_modules(layer, parameters)
    levels: dict[str, list[Group]] = {}
    for targets in _sharing(layer, parameters, hidden, call, dtype):
        role = bare_role(roles.get(targets[0], "other"))
        owner = owners.get(targets[0], "")
        group = Group(targets, owner, bool(owner) and role.endswith(".down"))
        levels.setdefault(_LEVELS.get(role, targets[0]), []).append(group)
    steps = []
    for groups in levels.values():
        chosen = [group for group in groups if set(group.targets) & set(wanted)]
        if chosen:
            steps.append(_probed(chosen, layer, parameters, hidden, call, dtype))
    return steps


def _sharing(
    layer: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    hidden: torch.Tensor,
    call: Arguments,
    dtype: torch.dtype,
) -> list[tuple[str, ...]]:
    """Names of parameters in the order of their use, together where they read the same tensor; stacks by themselves."""
    groups: dict[Any, list[str]] = {}
    held: list[torch.Tensor] = []
    seen: set[str] = set()

    def note(name: str, expert: int | None, x: torch.Tensor) -> None:
        if name in seen:
            return
        seen.add(name)
        held.append(x)  # else another tensor may get its address
        key = name if expert is not None else (x.data_ptr(), x.numel(), x.shape[-1])
        groups.setdefault(key, []).append(name)

    taps = Taps(parameters, dtype)
    taps.on_input = note
    taps.run(layer, hidden, call)
    return [tuple(names) for names in groups.values()]


class _Run:
    """One run of a layer: its sums, its output, the factors of its matrices' outputs, the weights of its experts."""

    def __init__(
        self,
        layer: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        hidden: torch.Tensor,
        call: Arguments,
        dtype: torch.dtype,
        noise: Callable[[int], torch.Tensor] | None = None,
        noisy: Collection[str] = (),
    ) -> None:
        self.sums: list[torch.Tensor | None] = []
        self.factors: dict[str, Any] = {}
        taps = Taps(parameters, dtype)
        shape = hidden.shape

        def add(number: int, s: torch.Tensor) -> None:
            fits = s.shape[-1:] == shape[-1:] and s.numel() == hidden.numel()
            self.sums.append(s.detach().clone().reshape(-1, shape[-1]) if fits else None)

        taps.on_sum = add
        taps.on_factor = self.factors.__setitem__
        taps.on_routes = lambda name, hidden, index, weights: self.factors.__setitem__(name, weights.sum(-1))
        if noise is not None:
            taps.noise, taps.noisy = noise(shape[-1]), frozenset(noisy)
        output = taps.run(layer, hidden, call)
        assert output is not None
        self.output = output.detach().clone().reshape(-1, shape[-1])


def _probed(
    groups: list[Group],
    layer: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    hidden: torch.Tensor,
    call: Arguments,
    dtype: torch.dtype,
) -> Step:
    """The step of some groups: one that writes to the residual stream where each of them does, at the same place."""
    plain: _Run | None = None
    scaled, places = [], set()
    for group in groups:
        if len(group.targets) > 1 or not _fits(parameters[group.targets[0]], hidden.shape[-1]):
            return Step(tuple(groups))
        plain = plain or _Run(layer, parameters, hidden, call, dtype)
        size = float(plain.output.square().mean().sqrt())

        def noise(width: int, size: float = size) -> torch.Tensor:
            signs = torch.arange(width, device=hidden.device) * 7 % 11 - 5
            return signs.to(hidden.dtype) * (0.1 * size)

        moved = _Run(layer, parameters, hidden, call, dtype, noise, group.targets)
        vector = noise(hidden.shape[-1])
        factor = plain.factors.get(group.experts or group.targets[0], 1.0)
        place, scale = _place(plain, moved, vector, factor)
        if place is None:
            return Step(tuple(groups))
        places.add(place)
        scaled.append(Group(group.targets, group.experts, group.inner, scale))
    return Step(tuple(scaled), places.pop()) if len(places) == 1 else Step(tuple(groups))


def _fits(parameter: nn.Parameter, width: int) -> bool:
    return width in parameter.shape[-2:]


def _place(plain: _Run, moved: _Run, vector: torch.Tensor, factor: Any) -> tuple[int | None, float | None]:
    """The last sum that noise moved by itself times a constant and the factor shown, and that constant."""
    places = [(OUTPUT, plain.output, moved.output)]
    if len(plain.sums) == len(moved.sums):
        pairs = list(zip(plain.sums, moved.sums, strict=True))
        places += [(n, a, b) for n, (a, b) in reversed(list(enumerate(pairs))) if a is not None and b is not None]
    for number, before, after in places:
        change = after - before
        along = change @ vector / vector.square().sum()
        size = float(along.abs().mean())
        if size <= 1e-6 or float((change - torch.outer(along, vector)).abs().amax()) > _TOLERANCE * size * float(
            vector.abs().amax()
        ):
            continue
        shown = factor.reshape(-1) if isinstance(factor, torch.Tensor) and factor.numel() > 1 else float(factor)
        if isinstance(shown, torch.Tensor) and shown.shape != along.shape:
            return None, None
        # where the factor is small its quotient says little
        scale = float((along * shown).sum() / (shown * shown * torch.ones_like(along)).sum())
        if float((along - scale * shown).abs().amax()) <= 2 * _TOLERANCE * max(size, abs(scale)):
            return number, scale
        return None, None
    return None, None
