"""Which checkpoints the plugin takes; what vLLM then does with them is in test_vllm.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halfbyte.engines.vllm_claims import fp8_cache, takes_over
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from small_models import DENSE_CONFIG, dense_tensors, linear, write_checkpoint

DENSE = SimpleNamespace(hidden_size=128)
MOE = SimpleNamespace(hidden_size=128, text_config=SimpleNamespace(num_experts=4))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plugin") / "dense", dense_tensors(), DENSE_CONFIG)


def settings(dense: Path, fmt: str, dialect: str = "compressed-tensors") -> Any:
    config = make_plan(Checkpoint.open(dense), linear(fmt), dialect).config
    assert config is not None
    return json.loads(config)["quantization_config"]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_its_own_dialect_and_mixfp4_are_decoded_everywhere(dense: Path, on_cpu: bool) -> None:
    assert takes_over(settings(dense, "nvfp4", "halfbyte"), None, DENSE, on_cpu)
    assert takes_over(settings(dense, "mixfp4"), None, DENSE, on_cpu)


@pytest.mark.parametrize(
    ("fmt", "decoded"),
    [
        ("nvfp4", True),
        ("mxfp4", True),
        ("mxfp8", True),
        ("fp8_block128", True),
        ("fp8_tensor", True),
        ("int4_g32", False),
        ("int4_g32_hadamard", True),
        ("fp8_channel", False),
    ],
)
def test_on_a_cpu_what_has_no_kernel_there_is_decoded(dense: Path, fmt: str, decoded: bool) -> None:
    assert takes_over(settings(dense, fmt), None, DENSE, True) is decoded


def test_int4_is_taken_where_layers_keep_it_packed(dense: Path) -> None:
    qwen, other = (SimpleNamespace(architectures=[name]) for name in ("Qwen3ForCausalLM", "FalconForCausalLM"))
    assert takes_over(settings(dense, "int4_g32"), None, qwen, True)
    assert not takes_over(settings(dense, "int4_g32"), None, other, True)
    assert not takes_over(settings(dense, "int4_g32"), None, qwen, False)
    assert not takes_over(settings(dense, "fp8_channel"), None, qwen, True)


def test_one_group_without_a_kernel_is_enough(dense: Path) -> None:
    both = settings(dense, "int4_g32")
    both["config_groups"]["group_1"] = settings(dense, "nvfp4")["config_groups"]["group_0"]
    assert takes_over(both, None, DENSE, True)


@pytest.mark.parametrize("fmt", ["int4_g32", "fp8_channel"])
def test_on_a_cpu_models_with_experts_are_decoded_in_every_format(dense: Path, fmt: str) -> None:
    assert takes_over(settings(dense, fmt), None, MOE, True)
    assert takes_over(settings(dense, fmt), None, SimpleNamespace(num_local_experts=8), True)
    assert not takes_over(settings(dense, fmt), None, SimpleNamespace(text_config=SimpleNamespace(num_experts=0)), True)


ELSEWHERE = [("compressed-tensors", fmt) for fmt in ("nvfp4", "mxfp4", "int4_g32", "int4_g32_hadamard", "fp8_block128")]
ELSEWHERE += [("modelopt", fmt) for fmt in ("nvfp4", "fp8_block128")]


@pytest.mark.parametrize(("dialect", "fmt"), ELSEWHERE)
def test_on_other_machines_vllm_keeps_what_it_has_kernels_for(dense: Path, fmt: str, dialect: str) -> None:
    assert not takes_over(settings(dense, fmt, dialect), None, MOE, False)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", None])
def test_methods_that_halfbyte_does_not_read_are_left_to_vllm(method: str | None) -> None:
    assert not takes_over({"quant_method": method}, None, MOE, True)


@pytest.mark.parametrize("fmt", ["nvfp4", "int4_g32", "mixfp4"])
def test_the_word_of_the_user_counts(dense: Path, fmt: str) -> None:
    assert takes_over(settings(dense, fmt), "halfbyte", DENSE, False)
    assert not takes_over(settings(dense, fmt), "compressed-tensors", MOE, True)


def test_an_fp8_cache_is_recognised_in_every_spelling() -> None:
    scheme = {"num_bits": 8, "type": "float", "dynamic": False}
    assert fp8_cache({"kv_cache_scheme": scheme}) == scheme
    assert fp8_cache({"quantization": {"kv_cache_quant_algo": "FP8"}})
    for other in ({**scheme, "strategy": "attn_head"}, {**scheme, "num_bits": 4}, "NVFP4", None):
        assert fp8_cache({"kv_cache_scheme": other}) is None
    assert fp8_cache({}) is None
