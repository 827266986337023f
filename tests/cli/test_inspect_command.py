from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any


def test_json_names_family_roles_and_totals(run_json: Callable[..., Any], demo_model: str) -> None:
    found = run_json("inspect", demo_model)
    assert found["family"] == "qwen3_5_moe"
    assert found["dialect"] is None
    assert found["mtp"] is True and found["vision"] is False
    roles = {role["role"]: role for role in found["roles"]}
    assert roles["experts.gate_up"]["dtypes"] == {"BF16": 4}
    assert sum(role["nbytes"] for role in found["roles"]) == found["data_bytes"] == 2 * found["parameters"]
    assert found["bits_per_weight"] == 16


def test_json_of_a_quantized_checkpoint_names_dialect_and_formats(run_json: Callable[..., Any], quantized: str) -> None:
    found = run_json("inspect", quantized)
    assert found["dialect"] == "compressed-tensors"  # what most engines load
    roles = {role["role"]: role for role in found["roles"]}
    assert roles["experts.down"]["formats"] == {"mxfp4": 4}
    assert roles["experts.down"]["tensors"] == 4 * 16 * 2  # layers, experts, codes and scales
    assert sum(role["nbytes"] for role in found["roles"]) == found["data_bytes"]


def test_json_sums_the_roles_of_a_class(run_json: Callable[..., Any], quantized: str) -> None:
    found = run_json("inspect", quantized)
    classes = {c["name"]: c for c in found["classes"]}
    assert sum(c["nbytes"] for c in found["classes"]) == found["data_bytes"]
    assert sum(c["tensors"] for c in found["classes"]) == found["tensors"]
    assert list(classes["routed experts"]["stored"]) == ["mxfp4"] and list(classes["MTP"]["stored"]) == ["BF16"]
    assert {"attention", "linear attention", "embedding", "lm_head", "router", "norms and others"} < set(classes)


def test_text_has_a_line_per_class_and_no_control_characters(run_text: Callable[..., str], demo_model: str) -> None:
    text = run_text("inspect", demo_model)
    assert "qwen3_5_moe (Qwen3_5MoeForCausalLM)" in text
    assert "multi-token prediction" in text
    assert any(line.split()[:3] == ["routed", "experts", "8"] for line in text.splitlines())
    assert all(c.isprintable() or c == "\n" for c in text)


def test_text_names_what_engines_lose_and_how_much(run_text: Callable[..., str], demo_model: str) -> None:
    text = run_text("inspect", demo_model)
    (line,) = (line for line in text.splitlines() if line.startswith("mlx-lm"))
    assert line.split(None, 3)[1:] == ["loses", "0.32.2", "MTP [19 tensors, 1.04 MB]"]
    assert "no known loss in SGLang, llama.cpp" in text
    assert any(line.split()[:3] == ["transformers", "loses", "5.23.0"] for line in text.splitlines())


def test_engines_that_nobody_tried_are_named_apart(run_text: Callable[..., str], tmp_path: Any) -> None:
    tensors = {"model.layers.0.mlp.experts.gate_up_proj_blocks": ["U8", [2, 64, 1, 16]]}
    tensors["model.layers.0.mlp.experts.gate_up_proj_scales"] = ["U8", [2, 64, 1]]
    config = {"model_type": "gpt_oss", "hidden_size": 32, "quantization_config": {"quant_method": "mxfp4"}}
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"config": config, "tensors": tensors}))
    text = run_text("inspect", "--inventory", str(path))
    assert "not tried with the dialect gpt-oss: mlx-lm, llama.cpp" in text
    assert "no known loss in halfbyte, transformers, vLLM, SGLang" in text


def test_roles_are_listed_on_demand(run_text: Callable[..., str], demo_model: str) -> None:
    text = run_text("inspect", demo_model, "--roles")
    assert any(line.split()[:2] == ["experts.down", "4"] for line in text.splitlines())
    assert all(c.isprintable() or c == "\n" for c in text)


def test_an_inventory_file_serves_as_well(run_json: Callable[..., Any], inventory: str) -> None:
    found = run_json("inspect", "--inventory", inventory)
    assert found["family"] == "llama"
    assert found["tensors"] == 17


def test_unknown_architecture_is_noted(run_text: Callable[..., str], tmp_path: Any) -> None:
    path = tmp_path / "x.json"
    path.write_text(
        '{"config": {"model_type": "novel"}, "tensors": {"layers.0.mlp.up_proj.weight": ["BF16", [32, 32]]}}'
    )
    assert "note        the architecture 'novel' is unknown" in run_text("inspect", "--inventory", str(path))


def test_source_and_inventory_exclude_each_other(refusal: Callable[..., str], inventory: str, demo_model: str) -> None:
    assert "either a checkpoint SRC or --inventory" in refusal("inspect", demo_model, "--inventory", inventory)
    assert "either a checkpoint SRC or --inventory" in refusal("inspect")


def test_installed_engines_are_named_with_their_versions(
    run_text: Callable[..., str], run_json: Callable[..., Any], demo_model: str
) -> None:
    torch_is_here = find_spec("transformers") is not None
    (line,) = (line for line in run_text("inspect", demo_model).splitlines() if line.startswith("installed "))
    installed = run_json("inspect", demo_model)["installed"]
    assert ("transformers" in installed) == torch_is_here
    for packages in installed.values():
        for name, version in packages.items():
            assert f"{name} {version}" in line and version == metadata.version(name)
