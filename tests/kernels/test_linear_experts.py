from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from halfbyte.errors import FormatError
from halfbyte.kernels import linear
from halfbyte.kernels.linear import NoKernelError, PackedExperts
from kernels.linear_cases import ISAS, activations, as_bf16, miss, weight

E, SLOTS = 5, 3


def sigmoid(v: Any) -> Any:
    return 0.5 * (1 + np.tanh(v / 2))


def act(kind: str, gate: Any, up: Any, limit: float, alpha: float) -> Any:
    if kind == "silu":
        return gate * sigmoid(gate) * up
    if kind == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    if kind == "clamped_swiglu":
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return (up + 1) * gate * sigmoid(alpha * gate)
    if kind == "relu2":
        return np.maximum(gate, 0) ** 2 * up
    return gate * up


def reference(x, chosen, shares, up_w, down_w, kind="silu", gated=True, interleaved=False, biases=(None, None)):
    """The mixture in FP64 from decoded weights."""
    w1, w2 = up_w.decode().astype(np.float64), down_w.decode().astype(np.float64)
    y = np.zeros((len(x), w2.shape[1]))
    for t in range(len(x)):
        for e, share in zip(chosen[t], shares[t], strict=True):
            if not 0 <= e < len(w1):
                continue
            h = w1[e] @ x[t].astype(np.float64) + (0 if biases[0] is None else biases[0][e])
            half = len(h) // 2
            gate, up = (h, 1.0) if not gated else (h[0::2], h[1::2]) if interleaved else (h[:half], h[half:])
            out = w2[e] @ act(kind, gate, up, 2.0, 1.702) + (0 if biases[1] is None else biases[1][e])
            y[t] += share * out
    return y


def routing(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    r = np.random.RandomState(seed)
    chosen = np.stack([r.permutation(E)[:SLOTS] for _ in range(rows)])
    return chosen, r.uniform(0.1, 1, (rows, SLOTS)).astype(np.float32)


def inputs(rows: int, k: int) -> np.ndarray:
    return activations(rows, k) / np.abs(activations(rows, k)).max(axis=1, keepdims=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "clamped_swiglu", "relu2", "identity"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_mixtures_are_those_of_decoded_weights(isa: str, kind: str, interleaved: bool) -> None:
    up, down = weight("mixfp4", (E, 2 * 48, 64)), weight("mixfp4", (E, 40, 48), 1)
    up.global_scale[:] = np.linspace(0.002, 0.006, E)
    biases = activations(E, 96, 5) * np.float32(0.1), activations(E, 40, 6)
    experts = PackedExperts(up, down, *biases, activation=kind, interleaved=interleaved, limit=2.0)
    for rows in (1, 3, 33):
        x, (chosen, shares) = inputs(rows, 64), routing(rows)
        wanted = reference(x, chosen, shares, up, down, kind, True, interleaved, biases)
        with linear.use_isa(isa):
            assert miss(experts(x, chosen, shares), wanted) <= 2e-6
            rounded = experts(x, chosen, shares, "int8")
            assert np.linalg.norm(rounded - wanted) <= 3e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp4_duquant", "int4_g32", "affine4_g32", "fp8_block128", "q8_0"])
def test_mixtures_in_other_formats(name: str) -> None:
    up, down = weight(name, (E, 128, 64)), weight(name, (E, 32, 64), 1)
    if up.global_scale is not None:
        up.global_scale[:] *= 0.05
    x, (chosen, shares) = inputs(7, 64) * np.float32(0.2), routing(7)
    wanted = reference(x, chosen, shares, up, down, "relu2")
    y = PackedExperts(up, down, activation="relu2")(x, chosen, shares)
    assert np.linalg.norm(y - wanted) <= 3e-6 * np.linalg.norm(wanted)


def test_experts_without_gates() -> None:
    up, down = weight("nvfp4", (E, 48, 64)), weight("nvfp4", (E, 40, 48), 1)
    x, (chosen, shares) = inputs(4, 64), routing(4)
    y = PackedExperts(up, down, activation="relu2", gated=False)(x, chosen, shares)
    assert miss(y, reference(x, chosen, shares, up, down, "relu2", gated=False)) <= 2e-6


def test_slots_of_no_expert_add_nothing() -> None:
    up, down = weight("nvfp4", (E, 64, 64)), weight("nvfp4", (E, 40, 32), 1)
    experts, x, (chosen, shares) = PackedExperts(up, down), inputs(3, 64), routing(3)
    chosen[0, 1], chosen[1, :], chosen[2, 0] = -1, E, 7
    y = experts(x, chosen, shares)
    wanted = reference(x, chosen, shares, up, down)
    assert not y[1].any() and miss(y[[0, 2]], wanted[[0, 2]]) <= 2e-6


def test_bf16_in_and_out() -> None:
    up, down = weight("mixfp4", (E, 64, 64)), weight("mixfp4", (E, 40, 32), 1)
    up.global_scale[:] = 0.02
    experts, (chosen, shares) = PackedExperts(up, down), routing(4)
    x = as_bf16(inputs(4, 64))
    y = experts(x, chosen, shares, dtype=x.dtype)
    wanted = reference(x.astype(np.float32), chosen, shares, up, down)
    assert y.dtype == x.dtype and miss(y.astype(np.float32), wanted) <= 5e-3


def test_auto_is_exact() -> None:
    experts = PackedExperts(weight("nvfp4", (E, 64, 64)), weight("nvfp4", (E, 40, 32), 1))
    x, routes = inputs(33, 64), routing(33)
    assert experts(x, *routes, "auto").tobytes() == experts(x, *routes, "exact").tobytes()


def test_bad_experts_are_refused_with_a_sentence() -> None:
    up, down = weight("nvfp4", (E, 64, 64)), weight("nvfp4", (E, 40, 32), 1)
    with pytest.raises(FormatError, match="not of the same experts"):
        PackedExperts(up, weight("nvfp4", (E, 40, 48)))
    with pytest.raises(FormatError, match="unknown activation"):
        PackedExperts(up, down, activation="tanh")
    with pytest.raises(NoKernelError, match="stacks"):
        PackedExperts(weight("nvfp4", (64, 64)), down)
    with pytest.raises(FormatError, match="slots"):
        PackedExperts(up, down)(inputs(2, 64), np.zeros((3, 2)), np.zeros((3, 2)))
