"""Mixtures of experts in Triton's interpreter, against decoded weights and a loop over slots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.gpu.weights import weight
from torch.nn import functional

from halfbyte.errors import FormatError, HalfbyteError
from halfbyte.gpu.device_experts import DeviceExperts, sort_slots, tiles_of, tokens_per_tile
from halfbyte.kernels.linear import NoKernelError

COUNT, WIDTH, K, N = 5, 48, 144, 40


def stacks(name: str = "mixfp4") -> tuple[Any, Any]:
    up, down = weight(name, (COUNT, 2 * WIDTH, K)), weight(name, (COUNT, N, WIDTH), 1)
    for stack in (up, down):  # every expert with a global scale of its own
        if stack.global_scale is not None:
            stack.global_scale = np.linspace(0.0004, 0.002, COUNT).astype(np.float32)
    return up, down


def routing(tokens: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.stack([torch.randperm(COUNT, generator=generator)[:slots] for _ in range(tokens)])
    return chosen, torch.rand(tokens, slots, generator=generator)


def activation(x: torch.Tensor, name: str) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    if name == "clamped_swiglu":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return (functional.silu(gate) if name == "silu" else functional.gelu(gate, approximate="tanh")) * up


def wanted(up: Any, down: Any, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, name: str) -> torch.Tensor:
    first, second = torch.from_numpy(up.decode()).double(), torch.from_numpy(down.decode()).double()
    y = torch.zeros(len(x), N, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for expert, share in zip(chosen[t].tolist(), shares[t].tolist(), strict=True):
            if 0 <= expert < COUNT:
                y[t] += share * (second[expert] @ activation(first[expert] @ row, name))
    return y


def difference(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize(("tokens", "name"), [(1, "mixfp4"), (13, "mixfp4"), (30, "if4"), (2, "int4_g16")])
def test_a_mixture_is_the_weighted_sum_of_its_experts(tokens: int, name: str) -> None:
    up, down = stacks(name)
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(3))
    chosen, shares = routing(tokens, 3)
    y = DeviceExperts(up, down, device="cpu")(x, chosen, shares)
    assert difference(y, wanted(up, down, x, chosen, shares, "silu")) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gelu_tanh", "clamped_swiglu"])
def test_other_activations_and_interleaved_rows_and_biases(name: str) -> None:
    up, down = stacks()
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(4))
    chosen, shares = routing(4, 2)
    plain = DeviceExperts(up, down, activation=name, device="cpu")(x, chosen, shares)
    assert difference(plain, wanted(up, down, x, chosen, shares, name)) < 2e-6
    mixed = np.arange(2 * WIDTH).reshape(2, WIDTH).T.reshape(-1)
    up.codes, up.scales = up.codes[:, mixed], up.scales[:, mixed]
    zeros = torch.zeros(COUNT, 2 * WIDTH)
    turned = DeviceExperts(up, down, zeros, torch.ones(COUNT, N), activation=name, interleaved=True, device="cpu")
    torch.testing.assert_close(turned(x, chosen, shares), plain + shares.sum(1, keepdim=True), rtol=1e-4, atol=1e-4)


def test_slots_of_no_expert_add_nothing() -> None:
    up, down = stacks()
    x, (chosen, shares) = torch.ones(3, K), routing(3, 2)
    chosen[0, 1], chosen[1] = -1, COUNT
    y = DeviceExperts(up, down, device="cpu")(x, chosen, shares)
    assert not y[1].any() and difference(y, wanted(up, down, x, chosen, shares, "silu")) < 2e-6


def test_the_other_tokens_do_not_change_a_tokens_result() -> None:
    up, down = stacks()
    mixture, x = DeviceExperts(up, down, device="cpu"), torch.randn(6, K, generator=torch.Generator().manual_seed(5))
    chosen, shares = routing(6, 2)
    whole = mixture(x, chosen, shares)
    assert torch.equal(mixture(x[2:3], chosen[2:3], shares[2:3])[0], whole[2])


@pytest.mark.parametrize("tokens", [8, 16])
def test_every_slot_has_one_place_in_a_tile_of_its_expert(tokens: int) -> None:
    chosen = torch.randint(-1, COUNT + 1, (37, 3), generator=torch.Generator().manual_seed(6))
    order = sort_slots(chosen, COUNT, tokens)
    assert len(order.tile_experts) == tiles_of(chosen.numel(), COUNT, tokens)
    held = [(int(s), int(order.tile_experts[i // tokens])) for i, s in enumerate(order.places) if s >= 0]
    flat = chosen.reshape(-1).tolist()
    assert sorted(s for s, _ in held) == [i for i, e in enumerate(flat) if 0 <= e < COUNT]
    assert all(flat[s] == expert for s, expert in held)


def test_tiles_suffice_where_every_slot_has_its_own_expert() -> None:
    chosen = torch.arange(8).reshape(8, 1)
    assert (sort_slots(chosen, 8, 8).places >= 0).sum() == 8
    assert [tokens_per_tile(8, 256), tokens_per_tile(4096, 256), tokens_per_tile(8192, 256)] == [8, 16, 32]


def test_what_has_no_product_is_named() -> None:
    up, down = stacks()
    with pytest.raises(NoKernelError, match="'relu2' has no product"):
        DeviceExperts(up, down, activation="relu2", device="cpu")
    with pytest.raises(FormatError, match="not of the same experts"):
        DeviceExperts(up, weight("mixfp4", (COUNT, N, 64)), device="cpu")
    with pytest.raises(NoKernelError, match="no multiple of 16"):
        DeviceExperts(weight("mixfp4", (2, 16, 32)), _narrow(), device="cpu")
    with pytest.raises(HalfbyteError, match="x, experts and shares"):
        DeviceExperts(up, down, device="cpu")(torch.zeros(2, K), torch.zeros(1, 2), torch.zeros(1, 2))


def _narrow() -> Any:
    stack = weight("mixfp4", (2, 16, 16))
    stack.shape = (2, 16, 8)
    return stack
