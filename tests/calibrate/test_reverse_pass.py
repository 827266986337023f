"""Gradients that come back layer by layer are those of the whole model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from halfbyte.calibrate.collect import CollectOptions, collect_statistics
from halfbyte.calibrate.output_gradients import CLIP
from halfbyte.calibrate.reverse_pass import SEED
from halfbyte.calibrate.samples import make_samples
from halfbyte.calibration.statistics import Statistics
from halfbyte.demo import MODEL
from halfbyte.runtime.loading import load, load_tokenizer

OPTIONS = CollectOptions(samples=4, length=32, output_hessians=True)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory, demo_text: str) -> Statistics:
    return collect_statistics(MODEL, tmp_path_factory.mktemp("statistics") / "demo", [demo_text], OPTIONS)


def test_gradients_are_those_of_the_whole_model_run_at_once(collected: Statistics, demo_text: str) -> None:
    model = load(MODEL, "float32")
    names = ["model.layers.0.linear_attn.in_proj_z", "model.layers.3.self_attn.o_proj"]
    seen: dict[str, torch.Tensor] = {}

    def listen(name: str):
        def hook(module, args, result):
            result.register_hook(lambda gradient: seen.update({name: gradient.flatten(0, -2)}))

        return hook

    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, result: result.detach().requires_grad_())
    for name in names:
        model.get_submodule(name).register_forward_hook(listen(name))
    ids = torch.tensor(make_samples([demo_text], load_tokenizer(MODEL), OPTIONS.samples, OPTIONS.length).tokens)
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(SEED))
        cross_entropy(logits, drawn[:, 0], reduction="sum").backward()
    for name in names:
        norm = seen[name].norm(dim=1, keepdim=True)
        clipped = seen[name] * (CLIP * norm.median() / norm).clamp(max=1)
        weight = next(w for w in collected.names if w.endswith(name.removeprefix("model.") + ".weight"))
        found, expected = collected.output_hessian(weight), (clipped.T @ clipped).numpy()
        assert found is not None
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


def test_experts_and_matrices_with_shared_inputs_have_sums_of_their_own(collected: Statistics) -> None:
    experts = next(n for n in collected.names if n.endswith("layers.1.mlp.experts.gate_up_proj"))
    count, sums = collected.array(experts, "count"), collected.output_hessian(experts)
    assert sums is not None and count is not None and sums.ndim == 3
    assert (np.trace(sums, axis1=1, axis2=2) > 0).tolist() == (count > 0).tolist()
    shared = [n for n in collected.same if "layers.3.self_attn" in n]
    assert shared
    for name in shared:
        own, other = collected.output_hessian(name), collected.output_hessian(collected.same[name])
        assert own is not None and other is not None and own.tobytes() != other.tobytes()


def test_the_other_statistics_are_those_of_a_run_without_gradients(
    collected: Statistics, demo_text: str, tmp_path: Path
) -> None:
    plain = collect_statistics(MODEL, tmp_path / "plain", [demo_text], CollectOptions(samples=4, length=32))
    for part in plain.description["parts"]:
        file = f"{part}.safetensors"
        assert (plain.folder / file).read_bytes() == (collected.folder / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_an_interrupted_run_continues_to_the_same_bytes(
    collected: Statistics, demo_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    from halfbyte.calibrate import collect

    out, write, written = tmp_path / "out", collect.write_part, []

    def fail(folder, name, part):
        written.append(name)
        if len(written) > stop:
            raise KeyboardInterrupt
        write(folder, name, part)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collect, "write_part", fail)
        collect_statistics(MODEL, out, [demo_text], OPTIONS)
    collect_statistics(MODEL, out, [demo_text], OPTIONS)
    for file in collected.folder.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    shutil.rmtree(out)
