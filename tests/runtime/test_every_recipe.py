"""A tiny Qwen3.5-MoE that transformers saved goes through every built-in recipe and loads again with equal logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import halfbyte.transformers  # noqa: F401
from halfbyte.checkpoint import Inventory
from halfbyte.runtime.remote.halfbyte_modules import QuantizedWeights
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from small_models import DATA_FREE, read_file

from . import qwen35
from .qwen35 import FUSED, PER_EXPERT, SPELLINGS, Models, decoded, inputs

Quantized = Callable[..., Path]
RECIPES = DATA_FREE
# text alone by design: there is no vision tower to load
TEXT_ONLY = ["makora-mixfp4"]
MULTIMODAL = [name for name in RECIPES if name not in TEXT_ONLY]


@torch.inference_mode()
def logits(model: Any, image: bool = False) -> torch.Tensor:
    return model(**inputs(image)).logits


def eager(model: Any) -> Any:
    """Experts one after the other, as weights in 4 bit are used; other ways to add them up round differently."""
    model.set_experts_implementation("eager")
    return model.eval()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_model_has_the_names_of_the_published_one(spelling: str, models: Models, shared: Path) -> None:
    def patterns(names: Any) -> set[str]:
        return {".".join("N" if part.isdigit() else part for part in name.split(".")) for name in names}

    published = Inventory.from_json(shared / "inventories" / "qwen36_35b_a3b.json")
    ours = Checkpoint.open(models[spelling])
    assert patterns(w.name for w in ours.weights) == patterns(published.tensors)
    assert sum(name.startswith("mtp.") for name in ours.inventory.tensors) == (19 if spelling == FUSED else 17 + 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_verify_finds_nothing_wrong_in_any_recipe_and_spelling(name: str, models: Models, quantized: Quantized) -> None:
    for spelling in SPELLINGS:
        result = verify(quantized(models[spelling], name), models[spelling])
        assert result.problems == [] and result.ok
        assert bool(result.dropped) == (name in TEXT_ONLY)


@pytest.mark.parametrize("name", RECIPES)
def test_both_spellings_of_experts_give_the_same_quantized_values(
    name: str, models: Models, quantized: Quantized
) -> None:
    fused, single = (decoded(quantized(models[spelling], name)) for spelling in SPELLINGS)
    assert fused.keys() == single.keys()
    assert [n for n in fused if fused[n].tobytes() != single[n].tobytes()] == []


@pytest.mark.parametrize("name", RECIPES)
def test_mtp_and_vision_are_the_source_s_bytes(name: str, models: Models, quantized: Quantized) -> None:
    source, out = read_file(models[FUSED]), read_file(quantized(models[FUSED], name))
    apart = [n for n in source if n.startswith(("mtp.", "model.visual."))]
    assert len(apart) > 30
    for tensor in apart:
        assert tensor not in out if name in TEXT_ONLY else source[tensor].tobytes() == out[tensor].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", MULTIMODAL)
def test_pictures_and_text_give_the_logits_of_the_decoded_weights(
    name: str, models: Models, quantized: Quantized, tmp_path: Path
) -> None:
    path = quantized(models[FUSED], name)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    assert type(model).__name__ == "Qwen3_5MoeForConditionalGeneration"
    # an independent way: all weights decoded by NumPy into an ordinary checkpoint, which transformers loads by itself
    plain = qwen35.write_dense(tmp_path / "plain", decoded(path), models[FUSED])
    dense = eager(AutoModelForImageTextToText.from_pretrained(plain))
    for image in (True, False):
        torch.testing.assert_close(logits(model, image), logits(dense, image), rtol=1e-4, atol=1e-4)
    source = AutoModelForImageTextToText.from_pretrained(models[FUSED], dtype=torch.float32)
    both = torch.stack([logits(model, True).flatten(), logits(source, True).flatten()])
    # a random model of two layers exaggerates errors; logits that have nothing in common have a correlation of 0
    assert 0.5 < torch.corrcoef(both)[0, 1] < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_text_alone_gives_the_logits_of_the_decoded_weights(
    name: str, models: Models, quantized: Quantized, tmp_path: Path
) -> None:
    path = quantized(models[PER_EXPERT], name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert type(model).__name__ == "Qwen3_5MoeForCausalLM"
    plain = qwen35.write_dense(tmp_path / "plain", decoded(path), models[FUSED])
    dense = eager(AutoModelForCausalLM.from_pretrained(plain))
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_recipe_quantizes_stays_in_4_or_8_bit_in_the_model(
    name: str, models: Models, quantized: Quantized
) -> None:
    path = quantized(models[FUSED], name, "halfbyte")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    held = {
        f"{module_name}.{weight}".removeprefix("model.")
        for module_name, module in model.named_modules()
        if isinstance(module, QuantizedWeights)
        for weight in module._decoders
    }
    wanted = {n.removeprefix("model.language_model.").removeprefix("model.") for n in Checkpoint.open(path).formats}
    assert held == wanted and held
    if name.startswith("ud-"):
        assert {"embed_tokens.weight", "lm_head.weight", "layers.0.mlp.gate.weight"} <= held
