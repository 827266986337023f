from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import halfbyte
from halfbyte import list_formats
from halfbyte.checkpoint import Reader
from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.runtime import load, load_tokenizer
from halfbyte.runtime.decode import to_torch
from halfbyte.runtime.remote.halfbyte_modules import QuantizedWeights
from halfbyte.source.checkpoint import Checkpoint
from small_models import linear, read_file, recipe, write_file

from .architectures import ARCHITECTURES

Saved = Callable[[str], Path]
Quantized = Callable[..., Path]
DEMO = Path(halfbyte.__file__).parent / "demo_model"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 20, 30]])


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids).logits


def decoded(path: Path, name: str) -> torch.Tensor:
    """A weight as the reference decodes it, by the end of its name."""
    checkpoint = Checkpoint.open(path)
    weight = next(w for w in checkpoint.weights if w.name.endswith(name))
    with Reader(checkpoint.inventory) as reader:
        return to_torch(np.ascontiguousarray(checkpoint.read(reader, weight)))


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compiled products add in another order than torch does."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))


def eager(model: Any) -> Any:
    model.set_experts_implementation("eager")
    return model


def copy_with(source: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a checkpoint whose tensors have been changed."""
    shutil.copytree(source, target)
    tensors = read_file(source)
    change(tensors)
    write_file(target / "model.safetensors", tensors)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("fmt", list_formats())
def test_a_model_in_any_format_gives_the_logits_of_its_decoded_weights(
    fmt: str, saved: Saved, quantized: Quantized
) -> None:
    path = quantized(saved("qwen3_moe_wide"), linear(fmt, if_not_divisible="keep"))
    model = load(path, torch.float32)
    # all attention projections but o_proj, whose K is 64, and the experts
    assert sum(isinstance(module, QuantizedWeights) for module in model.modules()) >= 4
    # an independent way: every weight decoded by NumPy, loaded into a model of transformers' own
    dense = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(saved("qwen3_moe_wide")), dtype=torch.float32)
    checkpoint = Checkpoint.open(path)
    with Reader(checkpoint.inventory) as reader:
        state = {w.name: to_torch(checkpoint.read(reader, w)).float() for w in checkpoint.weights}
    dense.load_state_dict(state)
    same(logits(model), logits(eager(dense.eval())))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("fmt", ["nvfp4", "int4_g32"])
def test_architectures_with_other_layouts_load_in_4_bit_and_dense_alike(
    architecture: str, fmt: str, saved: Saved, quantized: Quantized
) -> None:
    path = quantized(saved(architecture), linear(fmt, if_not_divisible="keep"))
    torch.testing.assert_close(
        logits(load(path, "float32")), logits(load(path, "float32", dequantize=True)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_plain_checkpoint_loads_as_transformers_loads_it(architecture: str, saved: Saved) -> None:
    expected = AutoModelForCausalLM.from_pretrained(saved(architecture), dtype=torch.float32)
    assert torch.equal(logits(load(saved(architecture), "float32")), logits(expected))


@pytest.mark.parametrize("name", ["qwen3-tiny-wiki", "qwen35moe-tiny-wiki"])
@pytest.mark.parametrize("fmt", ["mixfp4", "hif4"])
def test_trained_models_in_4_bit_equal_their_dense_selves(
    name: str, fmt: str, shared: Path, quantized: Quantized
) -> None:
    path = quantized(shared / "data" / "models" / name, linear(fmt))
    dense = load(path, "float32", dequantize=True)
    ids = torch.arange(100, 164)[None]
    found, expected = (logits(model, ids).double().log_softmax(-1) for model in (load(path, "float32"), dense))
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 1e-9


def test_the_demo_model_loads_and_says_that_its_draft_head_was_left_out(
    quantized: Quantized, caplog: pytest.LogCaptureFixture
) -> None:
    path = quantized(DEMO, linear("nvfp4"))
    model = load(path, "float32")
    assert (
        "19 tensors of the checkpoint are no part of Qwen3_5MoeForCausalLM and were left out: mtp (19)" in caplog.text
    )
    same(logits(model), logits(eager(load(path, "float32", dequantize=True))))


def test_quantized_draft_heads_are_left_out_too(quantized: Quantized, caplog: pytest.LogCaptureFixture) -> None:
    rule = {"format": "nvfp4", "scale_search": "absmax", "if_not_divisible": "keep"}
    path = quantized(DEMO, recipe({"match": ["linear", "mtp.experts"], **rule}))
    load(path, "float32")
    assert "were left out: mtp (" in caplog.text


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4", "int4_g32", "fp8_channel", "mixfp4"])
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_5_moe"])
def test_compressed_tensors_checkpoints_load_with_exactly_the_decoded_weights(
    fmt: str, architecture: str, saved: Saved, quantized: Quantized
) -> None:
    path = quantized(saved(architecture), linear(fmt, if_not_divisible="keep"), "compressed-tensors")
    model = load(path, "float32")
    dense = load(path, "float32", dequantize=True)
    same(logits(model), logits(eager(dense)))
    state = model.dequantize().state_dict()
    ends = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if "moe" in architecture else ["mlp.down_proj.weight"]
    for end in [*ends, "self_attn.q_proj.weight"]:
        name = next(n for n in state if n.endswith(end))
        assert torch.equal(state[name], decoded(path, name))
        assert torch.equal(dense.state_dict()[name], decoded(path, name))


def test_activation_scales_of_other_writers_are_left_out_and_named(
    saved: Saved, quantized: Quantized, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def add(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith("weight_global_scale")]:
            tensors[name.replace("weight_global", "input_global")] = np.ones(1, np.float32)

    source = quantized(saved("qwen3"), linear("nvfp4"), "compressed-tensors")
    model = load(copy_with(source, tmp_path / "w4a4", add), "float32")
    assert "were left out: model.layers (14)" in caplog.text
    assert torch.equal(logits(model), logits(load(source, "float32")))


@pytest.mark.parametrize(
    ("dialect", "names"),
    [("compressed-tensors", ("k_scale", "v_scale")), ("modelopt", ("k_proj.k_scale", "v_proj.v_scale"))],
)
def test_scales_of_a_kv_cache_are_left_out(
    dialect: str, names: tuple[str, str], saved: Saved, quantized: Quantized, tmp_path: Path
) -> None:
    def add(tensors: dict[str, Any]) -> None:
        for name in names:
            tensors[f"model.layers.0.self_attn.{name}"] = np.float32(0.5).reshape((1,) if dialect[0] == "c" else ())

    source = quantized(saved("qwen3"), linear("nvfp4"), dialect)
    model = load(copy_with(source, tmp_path / "cached", add), "float32")
    assert torch.equal(logits(model), logits(load(source, "float32")))


def test_both_dialects_hold_the_same_nvfp4_experts(saved: Saved, quantized: Quantized) -> None:
    source = saved("qwen3_5_moe")
    ours = load(quantized(source, linear("nvfp4", if_not_divisible="keep")), "float32", dequantize=True)
    path = quantized(source, linear("nvfp4", if_not_divisible="keep"), "compressed-tensors")
    theirs = load(path, "float32", dequantize=True)
    for name, values in ours.state_dict().items():
        # a reciprocal is stored there, so the products differ by a rounding
        torch.testing.assert_close(theirs.state_dict()[name], values, rtol=3e-7, atol=0)


def test_weights_are_rounded_to_the_dtype_of_the_config_by_default(saved: Saved, quantized: Quantized) -> None:
    path = quantized(saved("qwen3"), linear("nvfp4"))
    for model in (load(path), load(path, dequantize=True)):
        weight = model.model.layers[0].mlp.up_proj.weight
        expected = decoded(path, "layers.0.mlp.up_proj.weight").numpy().astype(ml_dtypes.bfloat16)
        assert torch.equal(weight, to_torch(expected))


@pytest.mark.parametrize("dtype", ["float99", "uint8", "float8_e4m3fn", torch.int32])
def test_a_dtype_that_models_cannot_compute_in_is_refused(dtype: Any, saved: Saved) -> None:
    with pytest.raises(HalfbyteError, match="use float32, bfloat16 or float16"):
        load(saved("qwen3"), dtype)


def test_tied_embeddings_are_quantized_once_and_used_twice(saved: Saved, quantized: Quantized) -> None:
    rule = {"match": ["linear", "embedding"], "format": "int4_g32", "scale_search": "absmax"}
    path = quantized(saved("llama-tied"), recipe(rule))
    model, dense = load(path, "float32"), load(path, "float32", dequantize=True)
    assert torch.equal(model.lm_head.weight, decoded(path, "embed_tokens.weight"))
    assert "lm_head.weight_codes" not in model.state_dict()
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    same(logits(model), logits(dense))


@pytest.mark.parametrize("kept", [["lm_head"], ["lm_head", "embedding"]])
def test_tied_embeddings_that_the_checkpoint_holds_as_its_head_or_twice_are_the_same_at_both_ends(
    kept: list[str], saved: Saved, quantized: Quantized, tmp_path: Path
) -> None:
    source = shutil.copytree(saved("llama-tied"), tmp_path / "model")
    tensors = read_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if "embedding" not in kept:
        del tensors["model.embed_tokens.weight"]
    write_file(source / "model.safetensors", tensors)
    path = quantized(source, recipe({"match": kept, "format": "int4_g32", "scale_search": "absmax"}))
    model, dense = load(path, "float32"), load(path, "float32", dequantize=True)
    assert torch.equal(model.model.embed_tokens.weight, decoded(path, "lm_head.weight"))
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    same(logits(model), logits(dense))


def test_a_model_loads_in_eval_mode_without_gradients_for_quantized_weights(saved: Saved, quantized: Quantized) -> None:
    model = load(quantized(saved("qwen3"), linear("nvfp4")))
    assert not model.training
    assert not any("proj" in name for name, _ in model.named_parameters())


def test_quantized_models_generate(saved: Saved, quantized: Quantized) -> None:
    path = quantized(saved("qwen3_moe"), linear("nvfp4", if_not_divisible="keep"))
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    found = load(path, "float32").generate(IDS, **kwargs)
    assert torch.equal(found, load(path, "float32", dequantize=True).generate(IDS, **kwargs))


@pytest.mark.parametrize("end", ["_scales", "norm.weight", "_codes"])
def test_a_missing_tensor_is_an_error_and_never_random(
    end: str, saved: Saved, quantized: Quantized, tmp_path: Path
) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        name = next(n for n in tensors if n.endswith(end))
        for companion in [n for n in tensors if n.startswith(name.removesuffix("codes"))]:
            del tensors[companion]

    path = copy_with(quantized(saved("qwen3"), linear("nvfp4")), tmp_path / "broken", drop)
    with pytest.raises(CheckpointError, match="lacks"):
        load(path)


@pytest.mark.parametrize("dialect", ["plain", "halfbyte", "compressed-tensors"])
def test_tensors_that_the_model_has_no_place_for_are_an_error(
    dialect: str, saved: Saved, quantized: Quantized, tmp_path: Path
) -> None:
    source = saved("qwen3") if dialect == "plain" else quantized(saved("qwen3"), linear("nvfp4"), dialect)

    def add(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if "layers.1.mlp.up_proj" in n]:
            tensors[name.replace("layers.1.", "layers.7.")] = tensors[name]

    with pytest.raises(CheckpointError, match=r"no place for .*layers\.7\.mlp\.up_proj"):
        load(copy_with(source, tmp_path / "broken", add))


def test_a_tensor_of_another_shape_is_an_error(saved: Saved, quantized: Quantized, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        name = next(n for n in tensors if n.endswith("layers.0.input_layernorm.weight"))
        tensors[name] = tensors[name][:32]

    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(copy_with(saved("qwen3"), tmp_path / "plain", cut))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(copy_with(quantized(saved("qwen3"), linear("nvfp4")), tmp_path / "quantized", cut))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq', which halfbyte does not read"),
        ({"model_type": "no_such_model"}, "transformers does not know the model"),
        ({"architectures": ["NoSuchModel"], "model_type": "vit"}, "no class for"),
    ],
)
def test_models_that_cannot_be_loaded_are_refused_with_a_reason(
    change: dict[str, Any], message: str, saved: Saved, tmp_path: Path
) -> None:
    path = shutil.copytree(saved("qwen3"), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_missing_tokenizer_is_an_error_of_one_sentence(saved: Saved) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(saved("qwen3"))


def test_loading_leaves_the_progress_bars_as_they_were(saved: Saved, caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging as bars

    bars.enable_progress_bar()
    try:
        with caplog.at_level(logging.INFO):
            load(saved("qwen3"))
        assert bars.is_progress_bar_enabled()
    finally:
        bars.disable_progress_bar()


def test_the_top_level_namespace_offers_load(saved: Saved) -> None:
    assert type(halfbyte.load(saved("qwen3"))).__name__ == "Qwen3ForCausalLM"


def test_a_weight_s_pieces_are_read_only_when_they_are_asked_for(saved: Saved) -> None:
    from halfbyte.runtime.loading import sources_of

    checkpoint = Checkpoint.open(saved("qwen3_5_moe"))
    with Reader(checkpoint.inventory) as reader:
        sources = dict(sources_of(checkpoint, reader))
    assert set(sources) == set(checkpoint.inventory.tensors)
    with pytest.raises(CheckpointError, match="closed"):
        next(iter(sources.values()))()
