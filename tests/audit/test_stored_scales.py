"""Scales that no engine can use, or that nobody calibrated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.audit.faulty import audited, codes_of, e4m3, nothing, scaled
from tests.small_models import Tensors

K_PROJ = "model.language_model.layers.1.self_attn.k_proj"
EXPERT = "model.language_model.layers.0.mlp.experts.2"


def test_a_nan_among_block_scales_is_found(good: Path, tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[f"{K_PROJ}.weight_scale"].view(np.uint8)[3, 2] = 0x7F

    result = audited(good, tmp_path / "out", damage)
    assert [f.tensors for f in result.problems] == [(f"{K_PROJ}.weight_scale",)]


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_a_global_scale_must_be_positive_and_finite(good: Path, tmp_path: Path, value: float) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[f"{K_PROJ}.weight_global_scale"][...] = value

    assert "global-scale" in codes_of(audited(good, tmp_path / "out", damage))


def test_blocks_whose_scale_vanished_are_counted(good: Path, tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[f"{K_PROJ}.weight_scale"][:2, :3] = e4m3(0)

    result = audited(good, tmp_path / "out", damage)
    found = next(f for f in result.problems if f.code == "scale-underflow")
    assert found.what.startswith("6 blocks in 1 tensor")


def test_blocks_of_zeros_may_have_a_scale_of_zero(good: Path, tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[f"{K_PROJ}.weight_scale"][:2, :3] = e4m3(0)
        tensors[f"{K_PROJ}.weight_packed"][:2, :24] = 0x80  # zeros of both signs

    assert audited(good, tmp_path / "out", damage).ok


def test_a_dead_expert_is_found(good: Path, tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[f"{EXPERT}.down_proj.weight_scale"][...] = e4m3(0)

    result = audited(good, tmp_path / "out", damage)
    assert "experts that can add nothing" in next(f.what for f in result.problems if f.code == "dead-matrix")


def test_block_scales_below_the_normal_numbers_are_poor(good: Path, tmp_path: Path) -> None:
    assert "scale-subnormal" in codes_of(audited(good, tmp_path / "out", scaled(".weight_scale", 2.0**-12, K_PROJ)))


@pytest.mark.parametrize("name", [K_PROJ, f"{EXPERT}.up_proj"])
def test_fused_projections_under_different_global_scales_are_found(good: Path, tmp_path: Path, name: str) -> None:
    result = audited(good, tmp_path / "out", scaled(".weight_global_scale", 1.5, name))
    found = next(f for f in result.problems if f.code == "unequal-global-scales")
    assert "vllm-project/vllm#54974" in found.seen and "by a factor of 1.5" in found.what


def inputs(config: dict[str, Any]) -> None:
    arguments = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = {**arguments, "dynamic": "local"}


def test_a_file_that_calls_itself_w4a4_without_input_scales_is_found(good: Path, tmp_path: Path) -> None:
    assert "declared-w4a4" in codes_of(audited(good, tmp_path / "out", nothing, config=inputs))


def test_experts_without_their_input_scale_are_found(good: Path, tmp_path: Path) -> None:
    def some_scales(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(".weight_packed") and EXPERT not in n]:
            tensors[name.replace("weight_packed", "input_global_scale")] = np.ones(1, np.float32)

    result = audited(good, tmp_path / "out", some_scales, config=inputs)
    found = next(f for f in result.problems if f.code == "input-scale-missing")
    assert set(found.tensors) == {f"{EXPERT}.{p}_proj" for p in ("gate", "up", "down")}
    assert found.seen == ("vllm-project/vllm#45212",)


def test_input_scales_of_zero_are_found_and_idle_ones_are_a_note(good: Path, tmp_path: Path) -> None:
    def zero(tensors: Tensors) -> None:
        tensors[f"{K_PROJ}.input_global_scale"] = np.zeros(1, np.float32)

    result = audited(good, tmp_path / "out", zero)
    assert codes_of(result) == {"input-scale"}
    assert "declared-w4a16" in {f.code for f in result.findings}


def test_modelopt_states_its_inputs_by_the_algorithm(modelopt: Path, tmp_path: Path) -> None:
    def algorithm(config: dict[str, Any]) -> None:
        settings = config["quantization_config"]
        settings["quant_algo"] = "NVFP4"
        for group in settings["config_groups"].values():
            group["input_activations"] = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}

    assert "declared-w4a4" in codes_of(audited(modelopt, tmp_path / "out", nothing, config=algorithm))


def test_cache_scales_of_one_are_a_note(good: Path, tmp_path: Path) -> None:
    def ones(tensors: Tensors) -> None:
        for kind in "kv":
            tensors[f"{K_PROJ.removesuffix('.k_proj')}.{kind}_scale"] = e4m3([1]).astype("bfloat16")

    result = audited(good, tmp_path / "out", ones)
    assert result.ok and "cache-scale-one" in {f.code for f in result.findings}
