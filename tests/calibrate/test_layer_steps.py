"""Steps of layers, found by running them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.calibrate.models import dense_model

from halfbyte.calibrate.layer_steps import OUTPUT, Step, find_steps
from halfbyte.calibrate.layerwise import LayerwiseModel, enter
from halfbyte.calibrate.taps import Taps
from halfbyte.checkpoint import Reader
from halfbyte.demo import MODEL
from halfbyte.source.checkpoint import Checkpoint


def _steps(source: Path, layers: int, post_norm: bool = False) -> list[list[Step]]:
    checkpoint = Checkpoint.open(source)
    found = []
    with Reader(checkpoint.inventory) as reader, torch.inference_mode():
        model = LayerwiseModel(checkpoint, reader, torch.float32, torch.device("cpu"))
        ids = torch.arange(24)[None] + 5
        with model.embedding(ids):
            hidden, calls = enter(model, ids)
        for layer, call in list(zip(model.layers, calls, strict=True))[:layers]:
            with model.filled(layer):
                parameters = model.parameters_of(layer)
                if post_norm:
                    _normalise_outputs(layer)
                roles = model.roles_of(parameters)
                found.append(find_steps(layer, parameters, roles, set(parameters), hidden, call))
                after = Taps(parameters).run(layer, hidden, call)
                assert after is not None
                hidden = after
    return found


def _normalise_outputs(layer: torch.nn.Module) -> None:
    """Put a norm behind the attention, as some families do."""
    attention = layer.self_attn

    def scaled(module: object, args: object, output: tuple[torch.Tensor, object]) -> tuple[torch.Tensor, object]:
        values = output[0]
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True)), output[1]

    attention.register_forward_hook(scaled)


def _short(step: Step) -> list[str]:
    return sorted(".".join(target.removesuffix(".weight").split(".")[-2:]) for target in step.targets)


def test_a_dense_layer_has_four_steps_of_which_two_write(tmp_path: Path) -> None:
    steps = _steps(dense_model(tmp_path / "m"), 1)[0]
    assert [_short(step) for step in steps] == [
        ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert [step.sum is None for step in steps] == [True, False, True, False]
    assert steps[3].sum == OUTPUT and steps[1].sum not in (None, OUTPUT)
    assert steps[1].groups[0].scale == pytest.approx(1, abs=1e-4)


def test_what_a_norm_follows_does_not_write_to_the_stream(tmp_path: Path) -> None:
    steps = _steps(dense_model(tmp_path / "m"), 1, post_norm=True)[0]
    assert steps[1].sum is None and steps[3].sum == OUTPUT


def test_experts_and_the_shared_one_read_and_write_together() -> None:
    first = _steps(MODEL, 1)[0]
    readers, writers = first[-2:]
    assert {"experts.gate_up_proj", "shared_expert.gate_proj"} <= set(_short(readers)) and readers.sum is None
    assert _short(writers) == ["experts.down_proj", "shared_expert.down_proj"] and writers.sum == OUTPUT
    assert {g.inner for g in writers.groups if g.experts} == {True}
    assert all(g.scale == pytest.approx(1, abs=1e-3) for g in writers.groups)


def test_only_steps_with_what_is_wanted_are_returned(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(dense_model(tmp_path / "m"))
    with Reader(checkpoint.inventory) as reader, torch.inference_mode():
        model = LayerwiseModel(checkpoint, reader, torch.float32, torch.device("cpu"))
        ids = torch.arange(16)[None]
        with model.embedding(ids):
            hidden, calls = enter(model, ids)
        with model.filled(model.layers[0]):
            parameters = model.parameters_of(model.layers[0])
            wanted = {name for name in parameters if "down_proj" in name}
            steps = find_steps(model.layers[0], parameters, model.roles_of(parameters), wanted, hidden, calls[0])
    assert [_short(step) for step in steps] == [["mlp.down_proj"]]
