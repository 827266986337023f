"""What else belongs to a quantized source: types of scales, scales of activations, settings, plans from headers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from halfbyte.checkpoint import Inventory
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from quantized_sources import EXPERTS_INT4, carried, kimi, proven, settings_of
from small_models import (
    DENSE_CONFIG,
    dense_tensors,
    linear,
    read_file,
    recipe,
    run,
    write_checkpoint,
)
from timing import within


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "source", dense_tensors(), DENSE_CONFIG)


@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt"])
def test_scales_keep_a_type_that_rounds_none_of_them(dense: Path, tmp_path: Path, dialect: str) -> None:
    run(dense, tmp_path / "a", linear("fp8_channel"), "compressed-tensors")
    stored = read_file(tmp_path / "a")
    for name in (name for name in stored if name.endswith("weight_scale")):
        stored[name] = stored[name].astype(np.float32) * np.float32(1.0001)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    source = write_checkpoint(tmp_path / "b", stored, config)
    for target in ("halfbyte", dialect):
        _, results = carried(source, tmp_path / target, linear("fp8_channel"), target)
        proven(tmp_path / target, source, len(results))
        kinds = {info.dtype for name, info in Inventory.open(tmp_path / target).tensors.items() if "scale" in name}
        assert kinds == {"F32"}


def test_scales_in_f16_are_not_rounded_to_bf16(tmp_path: Path) -> None:
    stored = read_file(kimi(tmp_path / "kimi"))
    for name in (name for name in stored if name.endswith("weight_scale")):
        stored[name] = (stored[name].astype(np.float32) * np.float32(1.001)).astype(np.float16)
    config = json.loads((tmp_path / "kimi" / "config.json").read_text())
    source = write_checkpoint(tmp_path / "source", stored, config)
    _, results = carried(source, tmp_path / "out", recipe(EXPERTS_INT4), "halfbyte")
    proven(tmp_path / "out", source, len(results))
    kinds = {info.dtype for name, info in Inventory.open(tmp_path / "out").tensors.items() if name.endswith("_scales")}
    assert kinds == {"F16"}


def test_scales_of_experts_in_different_types_are_an_error(tmp_path: Path) -> None:
    stored = read_file(kimi(tmp_path / "kimi"))
    name = "model.layers.1.mlp.experts.1.up_proj.weight_scale"
    stored[name] = stored[name].astype(np.float32)
    config = json.loads((tmp_path / "kimi" / "config.json").read_text())
    source = write_checkpoint(tmp_path / "b", stored, config)
    with pytest.raises(CheckpointError, match=r"1\.up_proj\.weight_scale is float32, but others of its kind are"):
        carried(source, tmp_path / "out", recipe(EXPERTS_INT4))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["halfbyte", "compressed-tensors"])
@pytest.mark.parametrize(("name", "action"), [("int4-g32", "transcode"), ("nvfp4", "quantize")])
def test_kimi_k2_is_planned_within_five_seconds_of_one_core(shared: Path, name: str, action: str, target: str) -> None:
    def planned() -> tuple[Checkpoint, Plan]:
        checkpoint = Checkpoint(Inventory.from_json(shared / "inventories" / "kimi_k2_thinking.patterns.json"))
        return checkpoint, make_plan(checkpoint, name, target)

    checkpoint, plan = within(5, planned)
    experts = [item for item in plan.items if item.weight.role.startswith("experts.")]
    assert len(experts) == 120 and {item.action for item in experts} == {action}
    assert len(checkpoint.inventory.tensors) == 208_215


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss_20b.json", "kimi_k2_thinking.patterns.json"])
def test_the_plan_counts_every_tensor_of_a_quantized_source_once(shared: Path, name: str) -> None:
    checkpoint = Checkpoint(Inventory.from_json(shared / "inventories" / name))
    plan = make_plan(checkpoint, "nvfp4")
    names = [entry["name"] for entry in plan.to_dict()["sources"]]
    assert len(names) == len(set(names)) == len(checkpoint.inventory.tensors)
    assert sum(entry["tensors"] for entry in plan.summary()["classes"]) == len(names)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_configuration_inside_that_of_the_text_model_is_found_and_replaced(tmp_path: Path, key: str) -> None:
    source = kimi(tmp_path / "kimi")
    config = json.loads((source / "config.json").read_text())
    text = {"hidden_size": 64, key: config.pop("quantization_config")}
    (source / "config.json").write_text(json.dumps({**config, "text_config": text}))
    _, results = carried(source, tmp_path / "out", recipe(EXPERTS_INT4))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"] == {"hidden_size": 64}
    proven(tmp_path / "out", source, len(results))


def test_settings_of_the_kv_cache_stay_in_the_same_dialect(tmp_path: Path) -> None:
    source = kimi(tmp_path / "kimi")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (source / "config.json").write_text(json.dumps(config))
    run(source, tmp_path / "same", recipe(EXPERTS_INT4), "compressed-tensors")
    assert settings_of(tmp_path / "same")["kv_cache_scheme"] == scheme
    plan = run(source, tmp_path / "other", recipe(EXPERTS_INT4), "halfbyte")
    assert any("KV cache" in note for note in plan.notes)


def test_a_source_in_a_dialect_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    config = {**DENSE_CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    source = write_checkpoint(tmp_path / "source", dense_tensors(), config)
    with pytest.raises(PlanError, match="is quantized by 'gptq', which cannot be read"):
        make_plan(Checkpoint.open(source), linear("nvfp4"))


def test_calibrated_scales_of_activations_go_from_one_dialect_to_the_other(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "a", linear("nvfp4"), "compressed-tensors")
    stored = read_file(tmp_path / "a")
    modules = [name.removesuffix(".weight_packed") for name in stored if name.endswith("weight_packed")]
    for k, module in enumerate(modules):
        stored[f"{module}.input_global_scale"] = np.array([100.0 + k], np.float32)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    source = write_checkpoint(tmp_path / "b", stored, config)
    plan = run(source, tmp_path / "c", linear("nvfp4"), "modelopt")
    assert settings_of(tmp_path / "c")["quant_algo"] == "NVFP4" and not plan.notes
    found, infos = read_file(tmp_path / "c"), Inventory.open(tmp_path / "c").tensors
    for module in modules:
        name = f"{module}.input_scale"
        assert infos[name].dtype == "F32" and infos[name].shape == ()
        assert found[name] == np.float32(1) / stored[f"{module}.input_global_scale"][0]
    result = verify(tmp_path / "c", source)
    assert result.problems == [] and not result.dropped
    run(tmp_path / "c", tmp_path / "d", linear("nvfp4"), "compressed-tensors")
    inputs = {group["input_activations"]["dynamic"] for group in settings_of(tmp_path / "d")["config_groups"].values()}
    assert inputs == {"local"}
    assert read_file(tmp_path / "d").keys() == stored.keys()
    found[f"{modules[0]}.input_scale"] = np.float32(7).reshape(())
    write_checkpoint(tmp_path / "c", found, json.loads((tmp_path / "c" / "config.json").read_text()))
    assert any("input_scale is not what" in problem for problem in verify(tmp_path / "c", source).problems)
