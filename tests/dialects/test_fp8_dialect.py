"""Block FP8 with ``weight_scale_inv``: every spelling of published checkpoints is read, and written as DeepSeek's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from halfbyte.checkpoint import Inventory, Reader
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from small_models import (
    DENSE_CONFIG,
    MOE_CONFIG,
    Tensors,
    dense_tensors,
    linear,
    moe_tensors,
    read_file,
    recipe,
    run,
    write_checkpoint,
)

SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def codes(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    raw[(raw & 127) == 127] = 0
    return raw.view(E4M3)


def scales(shape: tuple[int, ...], kind: Any = np.float32, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1e-5, 1e-3, shape).astype(kind)


def decoded(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The definition, element by element."""
    wide = np.empty(weight.shape, np.float32)
    for i, j in np.ndindex(weight.shape):
        wide[i, j] = np.float32(weight[i, j]) * np.float32(scale[i // 128, j // 128])
    return wide


def checkpoint(folder: Path, tensors: Tensors, config: dict[str, Any], **settings: Any) -> Checkpoint:
    found = {**config, "quantization_config": {**SETTINGS, **settings}}
    return Checkpoint.open(write_checkpoint(folder, tensors, found))


def values(found: Checkpoint) -> Tensors:
    with Reader(found.inventory) as reader:
        return {w.name: found.read(reader, w) for w in found.weights if w.name in found.formats}


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
def test_values_are_code_times_scale_also_in_ragged_blocks(tmp_path: Path, kind: Any) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weight, scale = codes((200, 260)), scales((2, 3), kind)
    found = checkpoint(tmp_path, {name: weight, f"{name}_scale_inv": scale}, DENSE_CONFIG)
    assert found.dialect is not None and found.dialect.name == "fp8"
    assert np.array_equal(values(found)[name], decoded(weight, scale))


def test_power_of_two_scales_in_one_byte_are_read(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weight = codes((128, 256))
    scale = np.array([[118, 125]], np.uint8).view(ml_dtypes.float8_e8m0fnu)
    found = checkpoint(tmp_path, {name: weight, f"{name}_scale_inv": scale}, DENSE_CONFIG, scale_fmt="ue8m0")
    assert np.array_equal(values(found)[name], decoded(weight, np.array([[2.0**-9, 0.25]])))


def expert_tensors() -> tuple[Tensors, Tensors]:
    """FP8 experts with one tensor each, and the dense stacks that they are."""
    prefix, tensors = "model.layers.0.mlp.experts", {}
    stacks = {f"{prefix}.gate_up_proj": np.empty((2, 256, 128)), f"{prefix}.down_proj": np.empty((2, 128, 128))}
    for expert in range(2):
        for i, part in enumerate(("gate_proj", "up_proj", "down_proj")):
            name = f"{prefix}.{expert}.{part}.weight"
            tensors[name] = codes((128, 128), 10 * expert + i)
            tensors[f"{name}_scale_inv"] = scales((1, 1), seed=20 * expert + i)
            whole = stacks[f"{prefix}.{'down_proj' if i == 2 else 'gate_up_proj'}"]
            whole[expert, 128 * (i % 2) : 128 * (i % 2) + 128] = decoded(tensors[name], tensors[f"{name}_scale_inv"])
    return tensors, stacks


def test_experts_with_one_tensor_each_are_read(tmp_path: Path) -> None:
    tensors, stacks = expert_tensors()
    found = values(checkpoint(tmp_path, tensors, {"model_type": "qwen3_moe", "num_experts": 2}))
    assert found.keys() == stacks.keys()
    assert all(np.array_equal(found[name], stacks[name]) for name in stacks)


def test_stacked_experts_are_read_and_keep_their_spelling(tmp_path: Path) -> None:
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    weight, scale = codes((4, 256, 128)), scales((4, 2, 1))
    found = checkpoint(tmp_path / "source", {name: weight, f"{name}_scale_inv": scale}, MOE_CONFIG)
    mine = values(found)[name]
    assert all(np.array_equal(mine[e], decoded(weight[e], scale[e])) for e in range(4))
    run(tmp_path / "source", tmp_path / "out", recipe({"match": "experts", "format": "fp8_block128"}), "fp8")
    after = read_file(tmp_path / "out")
    assert after[name].tobytes() == weight.tobytes() and after[f"{name}_scale_inv"].tobytes() == scale.tobytes()


def test_stacks_that_lie_as_in_out_are_turned(tmp_path: Path) -> None:
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    config = {"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": 128, "num_experts": 2}}
    weight, scale = codes((2, 128, 512)), scales((2, 1, 4))
    found = checkpoint(tmp_path / "source", {name: weight, f"{name}_scale_inv": scale}, config)
    for e, mine in enumerate(values(found)[name]):
        assert np.array_equal(mine, decoded(weight[e], scale[e]).T)
    rule = recipe({"match": "experts", "format": "fp8_block128"})
    for dialect in ("fp8", "modelopt", "halfbyte"):
        run(tmp_path / "source", tmp_path / dialect, rule, dialect)
        result = verify(tmp_path / dialect, tmp_path / "source")
        assert result.problems == [] and result.lossless == 1
    up = read_file(tmp_path / "fp8")[f"{name.rpartition('.')[0]}.1.up_proj.weight"]
    assert np.array_equal(up.view(np.uint8), weight[1].view(np.uint8)[:, 256:].T)


def test_the_older_spelling_with_one_scale_per_tensor_is_read(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weight, scale = codes((64, 128)), np.float32(0.0123).reshape(())
    tensors = {name: weight, f"{name}_scale": scale, f"{name.removesuffix('weight')}input_scale": scale}
    found = checkpoint(tmp_path / "source", tensors, DENSE_CONFIG, weight_block_size=None)
    assert np.array_equal(values(found)[name], decoded(weight, scale.reshape(1, 1)))
    plan = run(tmp_path / "source", tmp_path / "out", recipe({"match": "mlp", "format": "int4_g32"}))
    assert any("scales of activations are left out (1)" in note for note in plan.notes)
    assert verify(tmp_path / "out", tmp_path / "source").problems == []


def test_written_files_have_the_published_layout(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", moe_tensors(), MOE_CONFIG)
    run(source, tmp_path / "out", linear("fp8_block128"), "fp8")
    inventory = Inventory.open(tmp_path / "out")
    config = inventory.config["quantization_config"]
    assert {key: config[key] for key in SETTINGS} == SETTINGS
    name = "model.language_model.layers.1.mlp.experts.3.up_proj.weight"
    assert (inventory.tensors[name].dtype, inventory.tensors[name].shape) == ("F8_E4M3", (128, 128))
    scale = inventory.tensors[f"{name}_scale_inv"]
    assert (scale.dtype, scale.shape) == ("F32", (1, 1))
    kept = {"lm_head", "mtp.fc", "model.visual.merger.linear_fc1", "model.language_model.layers.0.mlp.gate"}
    assert kept <= set(config["modules_to_not_convert"])
    assert not any("down_proj" in module for module in config["modules_to_not_convert"] if "mtp" not in module)
    assert verify(tmp_path / "out", source).problems == []


def test_other_formats_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", dense_tensors(), DENSE_CONFIG)
    with pytest.raises(PlanError, match="the dialect fp8 holds fp8_block128 and nothing else, not nvfp4"):
        make_plan(Checkpoint.open(source), linear("nvfp4"), "fp8")


def test_other_block_sizes_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = {name: codes((64, 128)), f"{name}_scale_inv": scales((1, 2))}
    with pytest.raises(CheckpointError, match=r"has FP8 blocks of \[64, 64\], but only \[128, 128\] can be read"):
        checkpoint(tmp_path, tensors, DENSE_CONFIG, weight_block_size=[64, 64])


def test_a_weight_without_its_scale_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"down_proj\.weight is FP8, but .*_scale_inv is missing"):
        checkpoint(tmp_path, {"model.layers.0.mlp.down_proj.weight": codes((128, 128))}, DENSE_CONFIG)


SIZES = {
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
}
MOE = {
    **DENSE_CONFIG,
    **SIZES,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 128,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}


def with_experts(tensors: Tensors) -> Tensors:
    """The MLPs cut into a router and two experts with one tensor each."""
    found = {name: array for name, array in tensors.items() if ".mlp." not in name}
    for name, array in tensors.items():
        base, _, part = name.rpartition(".mlp.")
        if base:
            axis = 1 if "down" in part else 0
            for e, half in enumerate(np.split(array, 2, axis)):
                found[f"{base}.mlp.experts.{e}.{part}"] = np.ascontiguousarray(half)
            found[f"{base}.mlp.gate.weight"] = array[:2, :128].copy()
    return found


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_transformers_loads_our_values(tmp_path: Path, experts: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tensors = with_experts(dense_tensors()) if experts else dense_tensors()
    source = write_checkpoint(tmp_path / "source", tensors, MOE if experts else {**DENSE_CONFIG, **SIZES})
    run(source, tmp_path / "out", linear("fp8_block128"), "fp8")
    found = values(Checkpoint.open(tmp_path / "out"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    loaded = {name: p.detach().float().numpy() for name, p in model.named_parameters() if name in found}
    assert loaded.keys() == found.keys() and len(found) == (12 if experts else 14)
    for name, ours in found.items():
        assert np.array_equal(loaded[name], ours), name


def test_the_configuration_survives_a_dialect_change(tmp_path: Path) -> None:
    tensors, _ = expert_tensors()
    checkpoint(tmp_path / "source", tensors, {"model_type": "qwen3_moe", "num_experts": 2})
    keep = recipe({"match": "experts", "format": "fp8_block128"})
    for dialect in ("compressed-tensors", "modelopt", "halfbyte"):
        plan = run(tmp_path / "source", tmp_path / dialect, keep, dialect)
        assert {item.reason for item in plan.items} == {"lossless: the same codes and scales"}
        result = verify(tmp_path / dialect, tmp_path / "source")
        assert result.problems == [] and result.lossless == 2
