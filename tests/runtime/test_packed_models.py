from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfbyte import kernels
from halfbyte.errors import HalfbyteError
from halfbyte.kernels.linear import set_threads
from halfbyte.runtime import load, packed_quantizer
from halfbyte.runtime.kept_modules import KeptLinear
from halfbyte.runtime.packed_modules import PackedWeights
from small_models import linear, recipe

Saved = Callable[[str], Path]
Quantized = Callable[..., Path]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 20, 30]])
KEEP = {"if_not_divisible": "keep"}
DIALECTS = [
    ("halfbyte", "mixfp4"),
    ("halfbyte", "mxfp4_duquant"),
    ("compressed-tensors", "nvfp4"),
    ("compressed-tensors", "mxfp4"),
    ("compressed-tensors", "int4_g32"),
    ("compressed-tensors", "fp8_channel"),
    ("modelopt", "nvfp4"),
    ("mlx", "affine4_g32"),
]


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids).logits.float()


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))


def divergence(model: Any, dense: Any, ids: torch.Tensor) -> float:
    expected, found = (logits(m, ids).double().log_softmax(-1) for m in (dense, model))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def packed(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedWeights)]


@pytest.fixture
def qwen3(saved: Saved, quantized: Quantized) -> Path:
    return quantized(saved("qwen3"), linear("nvfp4", **KEEP))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "qwen3_5_moe"])
@pytest.mark.parametrize(("dialect", "fmt"), DIALECTS)
def test_checkpoints_of_every_dialect_run_packed(
    dialect: str, fmt: str, architecture: str, saved: Saved, quantized: Quantized
) -> None:
    path = quantized(saved(architecture), linear(fmt, **KEEP), dialect)
    model = load(path, "float32")
    names = packed(model)
    assert any(name.endswith("q_proj") for name in names)
    assert any(name.endswith("experts") for name in names) == (architecture != "qwen3")
    same(logits(model), logits(load(path, "float32", dequantize=True)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-tiny-wiki", "qwen35moe-tiny-wiki"])
@pytest.mark.parametrize("fmt", ["mixfp4", "mxfp4", "int4_g32"])
def test_trained_models_lose_nothing_in_exact_mode_and_little_in_int8(
    name: str, fmt: str, shared: Path, quantized: Quantized
) -> None:
    path = quantized(shared / "data" / "models" / name, linear(fmt, **KEEP))
    dense, ids = load(path, "float32", dequantize=True), torch.arange(100, 164)[None]
    exact = load(path, "float32")
    assert abs(divergence(exact, dense, ids)) <= 1e-5
    assert abs(divergence(load(path, "float32", mode="int8"), dense, ids)) <= 1e-3
    # BF16 rounds activations everywhere
    assert abs(divergence(load(path, "bfloat16"), load(path, "bfloat16", dequantize=True), ids)) <= 1e-3
    arguments = {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(exact.generate(ids[:, :8], **arguments), dense.generate(ids[:, :8], **arguments))


def test_heads_and_embeddings_run_packed(saved: Saved, quantized: Quantized) -> None:
    path = quantized(saved("qwen3"), recipe({"match": ["linear", "lm_head", "embedding"], "format": "int4_g32"}))
    model = load(path, "float32")
    assert {"model.embed_tokens", "lm_head"} <= set(packed(model))
    same(logits(model), logits(load(path, "float32", dequantize=True)))


def test_a_tied_head_is_the_packed_embedding_and_both_come_back_dense(saved: Saved, quantized: Quantized) -> None:
    path = quantized(saved("llama-tied"), recipe({"match": ["linear", "embedding"], "format": "int4_g32"}))
    model = load(path, "float32")
    assert model.lm_head._packed["weight"] is model.model.embed_tokens._packed["weight"]
    before = logits(model)
    model.dequantize()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    same(logits(model), before)


def test_projections_of_the_same_activations_are_one_product(qwen3: Path) -> None:
    attention = load(qwen3, "float32").model.layers[0].self_attn
    query, key, value = (getattr(attention, f"{name}_proj") for name in "qkv")
    assert query._packed["weight"].shared is key._packed["weight"].shared is value._packed["weight"].shared
    x = torch.randn(3, query.in_features, generator=torch.Generator().manual_seed(1))
    for module in (query, key, value):
        same(module(x), x @ module.weight.T)


def test_a_shared_product_is_computed_again_for_other_activations(qwen3: Path) -> None:
    attention = load(qwen3, "float32").model.layers[0].self_attn
    x = torch.randn(3, attention.q_proj.in_features, generator=torch.Generator().manual_seed(1))
    attention.q_proj(x)
    same(attention.k_proj(x * 2), 2 * x @ attention.k_proj.weight.T)
    attention.q_proj(x)
    attention.k_proj(x)
    x.mul_(2)
    same(attention.k_proj(x), x @ attention.k_proj.weight.T)
    attention.q_proj(x)
    x.mul_(2)
    same(attention.k_proj(x), x @ attention.k_proj.weight.T)


def test_results_do_not_depend_on_threads(qwen3: Path) -> None:
    model = load(qwen3, "float32")
    before, threads = logits(model), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = [module(torch.ones(1, 64)) for module in (model.model.layers[0].mlp.up_proj,)]
    finally:
        torch.set_num_threads(threads)
        set_threads(1)
    assert torch.equal(found[0], model.model.layers[0].mlp.up_proj(torch.ones(1, 64)))
    assert torch.equal(before, logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_packed_models_compile(architecture: str, saved: Saved, quantized: Quantized) -> None:
    model = load(quantized(saved(architecture), linear("mxfp4", **KEEP)), "float32")
    with torch.inference_mode():
        found = torch.compile(lambda ids: model(input_ids=ids, use_cache=False).logits, backend="aot_eager")(IDS)
    same(found, logits(model))


def test_kept_layers_run_by_compiled_products_for_a_few_tokens(qwen3: Path) -> None:
    model = load(qwen3)
    head = model.lm_head
    assert isinstance(head, KeptLinear) and isinstance(head, nn.Linear)
    x = torch.randn(2, head.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = (x.float() @ head.weight.float().T).bfloat16()
    assert torch.equal(head(x), expected)
    assert torch.equal(head(x.repeat(20, 1))[:2].float().isfinite(), torch.ones(2, head.out_features, dtype=torch.bool))
    model.to(torch.float32)
    same(head(x.float()), x.float() @ head.weight.T)


def test_the_dtype_of_a_packed_model_can_change(qwen3: Path) -> None:
    model = load(qwen3).to(torch.float32)
    same(logits(model), logits(load(qwen3, "float32", dequantize=True)))


def test_training_is_refused(qwen3: Path) -> None:
    model = load(qwen3)
    with pytest.raises(HalfbyteError, match="cannot be trained; load it with dequantize=True"):
        model.train()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_packed_model_is_not_copied_by_accident(qwen3: Path) -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        copy.deepcopy(load(qwen3))


def test_the_state_of_a_packed_model_is_that_of_its_checkpoint(qwen3: Path) -> None:
    state = load(qwen3).state_dict()
    from small_models import read_file

    stored = read_file(qwen3)
    assert set(stored) == set(state)
    name = "model.layers.0.mlp.up_proj.weight_codes"
    assert torch.equal(state[name], torch.from_numpy(stored[name]))


def test_on_a_device_without_products_weights_stay_in_4_bit(qwen3: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(qwen3)
    with caplog.at_level(logging.WARNING):
        model.to("meta")
    assert "no compiled products for meta" in caplog.text
    assert not packed(model)
    assert model.model.layers[0].mlp.up_proj.weight_codes.device.type == "meta"


def test_formats_without_a_product_are_decoded_at_every_call_and_that_is_said_once(
    saved: Saved, quantized: Quantized, caplog: pytest.LogCaptureFixture
) -> None:
    path = quantized(saved("qwen3"), linear("affine3_g32", **KEEP))
    packed_quantizer._say_once.cache_clear()  # another test may have been told
    model = load(path, "float32")
    assert caplog.text.count("affine3_g32 has no compiled product here") == 1
    assert not packed(model)
    same(logits(model), logits(load(path, "float32", dequantize=True)))


def test_without_compiled_kernels_models_run_as_before(qwen3: Path) -> None:
    expected = logits(load(qwen3, "float32", dequantize=True))
    with kernels.use_backend("reference"):
        model = load(qwen3, "float32")
        assert not packed(model)
        same(logits(model), expected)


def test_an_unknown_mode_is_refused(qwen3: Path) -> None:
    with pytest.raises(HalfbyteError, match="unknown mode 'fast'; there are exact, int8, auto"):
        load(qwen3, mode="fast")


@pytest.mark.parametrize(
    ("dialect", "fmt", "architecture"),
    [("fp8", "fp8_block128", "qwen3"), ("gpt-oss", "mxfp4", "gpt_oss")],
)
def test_checkpoints_of_models_own_dialects_run_packed(
    dialect: str, fmt: str, architecture: str, saved: Saved, quantized: Quantized
) -> None:
    match = "experts" if dialect == "gpt-oss" else "linear"
    path = quantized(saved(architecture), recipe({"match": match, "format": fmt, **KEEP}), dialect)
    model = load(path, "float32")
    assert any(name.endswith("experts" if architecture != "qwen3" else "q_proj") for name in packed(model))
    same(logits(model), logits(load(path, "float32", dequantize=True)))


@pytest.mark.parametrize("fmt", ["q4_0", "q8_0", "mxfp4"])
def test_gguf_files_beside_a_configuration_run_packed(
    fmt: str, shared: Path, quantized: Quantized, tmp_path: Path
) -> None:
    source = shared / "data" / "models" / "qwen3-tiny-wiki"
    path = quantized(source, linear(fmt, **KEEP), "gguf")
    for file in (*path.glob("*.gguf"), source / "config.json"):
        shutil.copy(file, tmp_path)
    model = load(tmp_path, "float32")
    assert any(name.endswith("q_proj") for name in packed(model))
    same(logits(model), logits(load(tmp_path, "float32", dequantize=True)))
