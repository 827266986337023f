"""Layers are filled with what the whole model has, and hold no more than they need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from halfbyte.calibrate.layerwise import LayerwiseModel
from halfbyte.calibrate.observe import Observer
from halfbyte.calibrate.states import States
from halfbyte.checkpoint import Reader
from halfbyte.errors import OutputError
from halfbyte.runtime.loading import load
from halfbyte.source.checkpoint import Checkpoint

EXPERTS = "model.layers.1.mlp.experts"
STACKS = [f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In BF16, each expert's projections in tensors of their own."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=5000, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=12, num_experts_per_tok=2,
        tie_word_embeddings=False, pad_token_id=4999, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("moe")
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def blocks(model: Path) -> Iterator[LayerwiseModel]:
    checkpoint = Checkpoint.open(model)
    with Reader(checkpoint.inventory) as reader, torch.inference_mode():
        yield LayerwiseModel(checkpoint, reader, torch.float32, torch.device("cpu"))


def test_a_filled_layer_has_the_weights_of_the_whole_model(blocks: LayerwiseModel, model: Path) -> None:
    assert "model.layers.1.mlp.experts.11.up_proj.weight" in Checkpoint.open(model).inventory.tensors
    whole = dict(load(model, "float32").named_parameters())
    with blocks.filled(blocks.layers[1]):
        filled = blocks.parameters_of(blocks.layers[1])
        assert len(filled) == 11
        for name, parameter in filled.items():
            assert torch.equal(parameter.float(), whole[name]), name
    assert all(p.is_meta for p in blocks.parameters_of(blocks.layers[1]).values())


def test_experts_are_kept_as_the_checkpoint_has_them(blocks: LayerwiseModel) -> None:
    with blocks.filled(blocks.layers[1]):
        types = {name: p.dtype for name, p in blocks.parameters_of(blocks.layers[1]).items()}
    assert {name for name, dtype in types.items() if dtype == torch.bfloat16} == set(STACKS)
    assert set(types.values()) == {torch.bfloat16, torch.float32}


def test_narrow_experts_give_what_wide_ones_do(blocks: LayerwiseModel, model: Path) -> None:
    experts = load(model, "float32").get_submodule(EXPERTS)
    experts.config._experts_implementation = "eager"
    x, weights = torch.randn(40, 32), torch.rand(40, 2)
    chosen = torch.stack([torch.randperm(12)[:2] for _ in range(40)])
    with Observer(dict(zip(STACKS, experts.parameters(), strict=True)), lambda *_: "own") as wide:
        expected = experts(x, chosen, weights)
    with blocks.filled(blocks.layers[1]):
        narrow = Observer({name: blocks.model.get_parameter(name) for name in STACKS}, lambda *_: "own")
        with narrow:
            assert torch.equal(blocks.model.get_submodule(EXPERTS)(x, chosen, weights), expected)
    for name in STACKS:
        for kind, array in wide.sums[name].arrays().items():
            np.testing.assert_array_equal(narrow.sums[name].arrays()[kind], array, err_msg=f"{name} {kind}")


def test_a_narrow_stack_behaves_as_if_it_were_wide(blocks: LayerwiseModel) -> None:
    with blocks.filled(blocks.layers[1]):
        stack = blocks.model.get_parameter(STACKS[1])
        expected = torch.ones(12, 3, 16) @ stack.float().transpose(1, 2)
        with Observer({STACKS[1]: stack}, lambda *_: ""):
            assert stack.dtype == torch.float32 and stack.shape == (12, 32, 16)
            assert stack[2:4].dtype == torch.float32
            assert torch.equal(torch.bmm(torch.ones(12, 3, 16), stack.transpose(1, 2)), expected)


def test_only_the_embeddings_of_the_text_are_kept(blocks: LayerwiseModel, model: Path) -> None:
    module = blocks.decoder.get_input_embeddings()
    ids = torch.tensor([[4998, 3, 7, 3], [4097, 4096, 0, 7]])
    expected = load(model, "float32").get_input_embeddings()(ids)
    with blocks.embedding(ids):
        assert module.weight.shape == (6, 32)
        assert torch.equal(module(ids), expected) and torch.equal(module(input=ids[1:]), expected[1:])
    assert module.weight.is_meta and module.weight.shape == (5000, 32) and module.padding_idx == 4999


def test_states_that_were_cut_off_are_not_read(tmp_path: Path) -> None:
    states = States(tmp_path / "states", 4)
    states.write(slice(0, 3), np.ones((3, 4), np.float32))
    assert (states.read(slice(1, 3)) == 1).all()
    with pytest.raises(OutputError, match="lost hidden states"):
        states.read(slice(2, 4))
