"""gpt-oss MXFP4: blocks and scales as published, judged by transformers' own loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from halfbyte.checkpoint import Inventory
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.plan.build import make_plan
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.verify.weights import verify
from quantized_sources import GPT_OSS, gpt_oss, gpt_oss_tensors, settings_of, values
from small_models import (
    MOE_CONFIG,
    linear,
    moe_tensors,
    read_file,
    recipe,
    write_checkpoint,
)

EXPERTS = "model.layers.1.mlp.experts"
BOTH_WIDTHS = pytest.mark.parametrize("inter", [64, 96], ids=["square as in gpt-oss-20b", "not square"])


@BOTH_WIDTHS
def test_stacks_are_written_as_blocks_and_scales(tmp_path: Path, inter: int) -> None:
    tensors = Inventory.open(gpt_oss(tmp_path / "source", inter)).tensors
    found = {name.removeprefix(EXPERTS): (t.dtype, t.shape) for name, t in tensors.items() if name.startswith(EXPERTS)}
    assert found == {
        ".gate_up_proj_blocks": ("U8", (4, 2 * inter, 2, 16)),
        ".gate_up_proj_scales": ("U8", (4, 2 * inter, 2)),
        ".gate_up_proj_bias": ("BF16", (4, 2 * inter)),
        ".down_proj_blocks": ("U8", (4, 64, inter // 32, 16)),
        ".down_proj_scales": ("U8", (4, 64, inter // 32)),
        ".down_proj_bias": ("BF16", (4, 64)),
    }


@BOTH_WIDTHS
def test_blocks_lie_as_out_in_and_the_unquantized_stacks_as_in_out(tmp_path: Path, inter: int) -> None:
    source = gpt_oss(tmp_path / "source", inter)
    dense = gpt_oss_tensors(inter)
    for name, found in values(source).items():
        original = np.swapaxes(dense[name].astype(np.float32), 1, 2)
        assert found.shape == original.shape
        assert ((found - original) ** 2).sum() < 0.03 * (original**2).sum()
    assert verify(source, tmp_path / "source-bf16").problems == []


def test_the_configuration_names_what_stays(tmp_path: Path) -> None:
    settings = settings_of(gpt_oss(tmp_path / "source"))
    assert settings["quant_method"] == "mxfp4"
    assert {"lm_head", "model.embed_tokens", "model.layers.*.mlp.router", "model.layers.*.self_attn.q_proj"} <= set(
        settings["modules_to_not_convert"]
    )


def test_the_published_model_is_planned_as_out_in(shared: Path) -> None:
    checkpoint = Checkpoint(Inventory.from_json(shared / "inventories" / "gpt_oss_20b.json"))
    assert checkpoint.dialect is not None and checkpoint.dialect.name == "gpt-oss"
    shapes = {w.shape for w in checkpoint.weights if w.name in checkpoint.formats}
    assert shapes == {(32, 5760, 2880), (32, 2880, 2880)}
    assert len(checkpoint.formats) == 2 * 24 and not any(w.transposed for w in checkpoint.weights)
    plan = make_plan(checkpoint, recipe({"match": "experts", "format": "nvfp4"}))
    experts = [item for item in plan.items if item.weight.role.startswith("experts.") and item.format]
    assert {item.action for item in experts} == {"transcode"}
    assert {item.reason for item in experts} == {"lossless where the exponents fit, else requantized"}


def test_other_formats_and_models_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", moe_tensors(), MOE_CONFIG)
    with pytest.raises(PlanError, match="the dialect gpt-oss holds stacked experts in mxfp4 and nothing else"):
        make_plan(Checkpoint.open(source), linear("mxfp4"), "gpt-oss")
    with pytest.raises(PlanError, match="is read for gpt-oss models only"):
        make_plan(Checkpoint.open(source), recipe({"match": "experts.gate_up", "format": "mxfp4"}), "gpt-oss")


def test_blocks_of_another_shape_are_an_error(tmp_path: Path) -> None:
    name = f"{EXPERTS}.down_proj"
    tensors = {f"{name}_blocks": np.zeros((4, 64, 32), np.uint8), f"{name}_scales": np.zeros((4, 64, 2), np.uint8)}
    config = {**GPT_OSS, "quantization_config": {"quant_method": "mxfp4"}}
    with pytest.raises(CheckpointError, match=r"down_proj_blocks is U8 \[4, 64, 32\], but MXFP4 blocks are"):
        Checkpoint.open(write_checkpoint(tmp_path, tensors, config))


def test_blocks_without_scales_are_an_error(tmp_path: Path) -> None:
    stored = read_file(gpt_oss(tmp_path / "source"))
    del stored[f"{EXPERTS}.down_proj_scales"]
    config = {**GPT_OSS, "quantization_config": {"quant_method": "mxfp4"}}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "bad", stored, config))
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.1\.mlp\.experts\.down_proj_scales"):
        make_plan(checkpoint, recipe({"match": "experts", "format": "nvfp4"}))


@BOTH_WIDTHS
def test_transformers_loads_our_file_with_the_logits_of_our_values(tmp_path: Path, inter: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = gpt_oss(tmp_path / "source", inter)
    stored, ours = read_file(source), values(source)
    for name, found in ours.items():
        blocks, scales = (torch.from_numpy(stored[f"{name}_{part}"].copy()) for part in ("blocks", "scales"))
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
        assert np.array_equal(theirs, np.swapaxes(found, 1, 2))
    plain = {name: array for name, array in gpt_oss_tensors(inter).items() if name not in ours}
    plain |= {
        name: np.ascontiguousarray(np.swapaxes(found, 1, 2)).astype(stored["lm_head.weight"].dtype)
        for name, found in ours.items()
    }
    dense = write_checkpoint(tmp_path / "dense", plain, {**GPT_OSS, "intermediate_size": inter})
    tokens = torch.arange(24).reshape(1, 24)
    logits = []
    for folder in (source, dense):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.isfinite(logits[0]).all() and logits[0].std() > 0
    assert torch.equal(logits[0], logits[1])
