from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.checkpoint import Inventory
from small_models import hashes, read_file

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_synthetic_checkpoint.py"
TENSORS = {
    "model.embed_tokens.weight": ["BF16", [64, 32]],
    "model.layers.{0..3}.self_attn.q_proj.weight": ["BF16", [32, 32]],
    "model.layers.{0..3}.input_layernorm.weight": ["BF16", [32]],
    "model.layers.{0..3}.mlp.down_proj.weight_packed": ["U8", [32, 16]],
    "mtp.layers.0.input_layernorm.weight": ["F32", [32]],
}


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_synthetic_checkpoint", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    config = {"model_type": "qwen3", "num_hidden_layers": 4}
    path = tmp_path / "inventory.json"
    path.write_text(json.dumps({"config": config, "meta": {}, "tensors": TENSORS}))
    return path


@pytest.mark.slow
def test_names_shapes_and_dtypes_are_those_of_the_inventory(script: Any, inventory: Path, tmp_path: Path) -> None:
    size = script.write(inventory, tmp_path / "out")
    wanted, found = Inventory.from_json(inventory), Inventory.open(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in found.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in wanted.tensors.items()
    }
    assert found.config == wanted.config and size == found.total_bytes


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_others(script: Any, inventory: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.write(inventory, tmp_path / name, seed=seed)
    found = [hashes(tmp_path / name)["model.safetensors"] for name in "abc"]
    assert found[0] == found[1] != found[2]


def test_fewer_layers_are_the_first_ones_with_the_same_values(script: Any, inventory: Path, tmp_path: Path) -> None:
    script.write(inventory, tmp_path / "all")
    script.write(inventory, tmp_path / "two", layers=2)
    whole, part = read_file(tmp_path / "all"), read_file(tmp_path / "two")
    assert len(part) == 2 + 2 * 3 and all(part[name].tobytes() == whole[name].tobytes() for name in part)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["num_hidden_layers"] == 2


def test_large_checkpoints_have_several_files_and_an_index(script: Any, inventory: Path, tmp_path: Path) -> None:
    script.write(inventory, tmp_path / "one")
    script.write(inventory, tmp_path / "many", shard_bytes=4096)
    one, many = read_file(tmp_path / "one"), read_file(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert one.keys() == many.keys() and all(one[name].tobytes() == many[name].tobytes() for name in one)


def test_weights_are_heavy_tailed_and_norms_close_to_one(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "inventory.json"
    tensors = {"a.weight": ["F32", [400, 500]], "norm.weight": ["F32", [1000]]}
    path.write_text(json.dumps({"config": {}, "meta": {}, "tensors": tensors}))
    script.write(path, tmp_path / "out")
    values = read_file(tmp_path / "out")
    weight = values["a.weight"].astype(np.float64)
    assert 5 < (weight**4).mean() / (weight**2).mean() ** 2 < 100  # a normal distribution has 3
    assert abs(values["norm.weight"].mean() - 1) < 0.02
