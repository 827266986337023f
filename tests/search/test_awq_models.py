"""Folding, judged by transformers: with every group folded by random scales a model computes the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.checkpoint import Reader, ShardWriter, build_header
from halfbyte.models import Weight
from halfbyte.models.smoothing_groups import find_groups
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.smoothing import Smoothing, make_smoothings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from runtime import architectures  # noqa: E402

MIXED = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
}
# beside those that are tested as models: other orders of norms, other norms, biases
MORE = {
    "gemma": architectures._model("Gemma"),
    "gemma2": architectures._model("Gemma2"),
    "glm4": architectures._model("Glm4"),
    "qwen2": architectures._model("Qwen2"),
    "qwen3_next": architectures._model("Qwen3Next", **MIXED),
    "phi": architectures._model("Phi"),
    "phimoe": architectures._model("Phimoe", num_local_experts=4, num_experts_per_tok=2),
    "olmo2": architectures._model("Olmo2"),
    "minimax_m2": architectures._model("MiniMaxM2", num_local_experts=4, num_experts_per_tok=2, rotary_dim=8),
}
MORE["nemotron_h"] = architectures._model(
    "NemotronH",
    layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
    num_hidden_layers=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=64,
    mamba_num_heads=4,
    mamba_head_dim=16,
    n_groups=1,
    ssm_state_size=8,
)
MODELS = {**{n: m for n, m in architectures.ARCHITECTURES.items() if n != "qwen3_moe_wide"}, **MORE}
# groups per model that are folded: one that is missing would go unnoticed
FOLDED = {"gpt_oss": 5, "qwen3_5_moe": 9, "llama": 7, "llama-tied": 6, "phi3": 7, "olmoe": 7}


def fold(source: Path, out: Path) -> int:
    """Write a copy in FP32 with all groups folded; the number of groups."""
    checkpoint = Checkpoint.open(source)
    tied = bool(checkpoint.inventory.config.get("tie_word_embeddings"))
    groups = [g for g in find_groups(checkpoint.weights, checkpoint.family, tied=tied) if g.refusal is None]
    rng = np.random.default_rng(5)
    shapes = {g.name: (g.channels,) if g.experts is None else (g.experts, g.channels) for g in groups}
    scales = {name: np.exp2(rng.uniform(-2, 2, shape)).astype(np.float32) for name, shape in shapes.items()}
    with Reader(checkpoint.inventory) as reader:
        smoothings = make_smoothings(checkpoint, reader, groups, scales)
        arrays: dict[str, Any] = {
            w.name: smoothings.get(w.name, Smoothing()).apply(checkpoint.read(reader, w)).astype(np.float32)
            for w in checkpoint.weights
        }
    out.mkdir()
    shutil.copy(source / "config.json", out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    tensors = [pair for w in checkpoint.weights for pair in pieces(w, arrays[w.name])]
    layout = build_header([(name, "F32", array.shape) for name, array in tensors])
    with ShardWriter(out / "model.safetensors", layout) as writer:
        for (_, array), offset in zip(tensors, layout.offsets, strict=True):
            writer.write_at(offset, np.ascontiguousarray(array))
        writer.commit()
    return len(groups)


def pieces(weight: Weight, array: Any) -> list[tuple[str, Any]]:
    if weight.transposed:
        array = np.swapaxes(array, -1, -2)
    cut = [(p.source, array if p.expert is None else array[p.expert]) for p in weight.pieces]
    return [(n, a[slice(*p.rows)] if p.rows else a) for (n, a), p in zip(cut, weight.pieces, strict=True)]


def logits(folder: Path, ids: Any) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    known = transformers.AutoModelForCausalLM
    if any(name.endswith("ForConditionalGeneration") for name in config.architectures):
        known = transformers.AutoModelForImageTextToText
    model = known.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_folded_model_computes_the_same(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(architectures.ARCHITECTURES, name, MODELS[name])
    source = architectures.save(name, tmp_path / "source")
    groups = fold(source, tmp_path / "folded")
    assert groups == FOLDED.get(name, groups) and groups >= 3
    ids = torch.arange(3, 27)[None]
    before, after = logits(source, ids), logits(tmp_path / "folded", ids)
    assert float((before - after).abs().max()) < 1e-4 * max(1.0, float(before.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-tiny-wiki", "qwen35moe-tiny-wiki"])
def test_a_trained_model_computes_the_same(shared: Path, tmp_path: Path, name: str) -> None:
    source = shared / "data" / "models" / name
    assert fold(source, tmp_path / "folded") == {"qwen3-tiny-wiki": 19, "qwen35moe-tiny-wiki": 17}[name]
    ids = torch.arange(100, 356)[None]
    before, after = logits(source, ids), logits(tmp_path / "folded", ids)
    assert float((before - after).abs().max()) < 1e-4
