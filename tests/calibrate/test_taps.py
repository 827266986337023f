"""What taps show of a layer, and that they leave its result alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halfbyte.calibrate.taps import StopLayer, Taps, experts_modules


class Layer(nn.Module):
    """A norm-free residual layer with a gated output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.write = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.sigmoid(hidden[..., :1]) * self.write(torch.relu(self.read(hidden)))


def _taps(layer: nn.Module) -> Taps:
    return Taps(dict(layer.named_parameters()))


@torch.inference_mode()
def test_inputs_factors_and_sums_are_shown_and_nothing_changes() -> None:
    layer, x = Layer(), torch.randn(2, 3, 4)
    taps, shown = _taps(layer), {}
    taps.on_input = lambda name, expert, inputs: shown.__setitem__(name, inputs)
    taps.on_factor = lambda name, factor: shown.__setitem__(f"{name} factor", factor)
    taps.on_sum = lambda number, s: shown.__setitem__(number, s)
    output = taps.run(layer, x, ((), {}))
    torch.testing.assert_close(output, layer(x), rtol=0, atol=0)
    torch.testing.assert_close(shown["read.weight"], x)
    torch.testing.assert_close(shown["write.weight"], torch.relu(layer.read(x)))
    torch.testing.assert_close(shown["write.weight factor"], torch.sigmoid(x[..., :1]))
    torch.testing.assert_close(shown[0], output)


@torch.inference_mode()
def test_noise_on_an_output_arrives_in_the_sum_times_its_factor() -> None:
    layer, x = Layer(), torch.randn(2, 3, 4)
    taps = _taps(layer)
    taps.noise, taps.noisy = torch.arange(4.0), frozenset({"write.weight"})
    moved = taps.run(layer, x, ((), {}))
    assert moved is not None
    torch.testing.assert_close(moved - layer(x), torch.sigmoid(x[..., :1]) * torch.arange(4.0), rtol=1e-4, atol=1e-5)


def test_a_run_ends_where_it_is_stopped() -> None:
    layer, seen = Layer(), []

    def stop(name: str, expert: int | None, x: torch.Tensor) -> None:
        seen.append(name)
        raise StopLayer

    taps = _taps(layer)
    taps.on_input = stop
    assert taps.run(layer, torch.randn(1, 2, 4), ((), {})) is None
    assert seen == ["read.weight"]


def test_the_modules_of_stacks_are_known_by_their_names() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(2, 3, 4))

        def forward(self, *args: Any) -> None: ...

    layer = nn.Module()
    layer.experts, layer.other = Experts(), nn.Linear(2, 2)
    named = {f"model.{name}": p for name, p in layer.named_parameters()}
    assert experts_modules(layer, named) == {"model.experts.up": "experts"}
