"""Adapters are named as what they are; a model that has an adapter beside it is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoint.builders import write_floats
from halfbyte.checkpoint import Inventory
from halfbyte.errors import CheckpointError

LORA = ("base_model.model.layers.0.q_proj.lora_A.weight", "base_model.model.layers.0.q_proj.lora_B.weight")


def config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "me/base"}))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapters.safetensors", "model.safetensors"])
def test_an_adapter_is_named_with_its_base_model(file: str, tmp_path: Path) -> None:
    config(tmp_path)
    write_floats(tmp_path / file, *LORA)
    for source in (tmp_path, tmp_path / file):
        with pytest.raises(CheckpointError, match=rf"holds an adapter of me/base \({file}\) and no model"):
            Inventory.open(source)


def test_an_adapter_in_another_format_is_named_too(tmp_path: Path) -> None:
    config(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="holds an adapter of me/base"):
        Inventory.open(tmp_path)


def test_an_adapter_without_low_rank_factors_or_configuration_is_named(tmp_path: Path) -> None:
    write_floats(tmp_path / "adapter_model.safetensors", "prompt_embeddings")
    with pytest.raises(CheckpointError, match=r"holds an adapter \(adapter_model"):
        Inventory.open(tmp_path)


def test_a_model_with_an_adapter_beside_it_is_read(tmp_path: Path) -> None:
    config(tmp_path)
    write_floats(tmp_path / "model.safetensors", "model.norm.weight")
    write_floats(tmp_path / "adapter_model.safetensors", *LORA)
    found = Inventory.open(tmp_path)
    assert list(found.tensors) == ["model.norm.weight"] and "adapter_model.safetensors" in found.ignored_files


def test_factors_inside_of_a_model_are_weights(tmp_path: Path) -> None:
    write_floats(tmp_path / "model.safetensors", "model.norm.weight", *LORA)
    assert len(Inventory.open(tmp_path).tensors) == 3
