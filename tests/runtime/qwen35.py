"""A tiny Qwen3.5-MoE with everything the real one has: DeltaNet, full attention, shared expert, vision tower, MTP.

transformers builds and saves the model in both spellings of experts. It has no MTP layer of its own and would drop
one, so those tensors are added to its files, under the names of the published checkpoints.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from halfbyte.checkpoint import Reader
from halfbyte.source.checkpoint import Checkpoint
from small_models import Tensors, heavy_tailed, read_file, spell_per_expert, write_file

from .architectures import QWEN35_TEXT, QWEN35_VISION

# large enough for groups of 128 in every matrix that recipes quantize, and for two square blocks in some
HIDDEN, INTER, EXPERTS, VOCAB, IMAGE = 128, 256, 4, 96, 90
TEXT: dict[str, Any] = {
    **QWEN35_TEXT,
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTER,
    "shared_expert_intermediate_size": INTER,
    "num_experts": EXPERTS,
    "linear_value_head_dim": 32,
}
# 48 is a multiple of 16 and not of 32, as 4304 in the published model
VISION: dict[str, Any] = {**QWEN35_VISION, "out_hidden_size": HIDDEN, "intermediate_size": 48}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
FUSED, PER_EXPERT = "fused", "per expert"
SPELLINGS = (FUSED, PER_EXPERT)
Models = dict[str, Path]


def save_both(folder: Path) -> Models:
    """The same model in both spellings, each written by ``save_pretrained`` and completed with its MTP tensors."""
    config = transformers.Qwen3_5MoeConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=False, **TOKENS)
    model = transformers.Qwen3_5MoeForConditionalGeneration(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_values(name, tuple(parameter.shape)).astype(np.float32)))
    # a model that was built saves one tensor per expert, one that was loaded saves what it was loaded from
    saved = {PER_EXPERT: folder / "per-expert", FUSED: folder / "fused"}
    model.save_pretrained(saved[PER_EXPERT])
    single = read_file(saved[PER_EXPERT])
    stacks = {n: _values(n, tuple(p.shape)) for n, p in model.named_parameters() if ".mlp.experts." in n}
    others = {n: a for n, a in single.items() if ".mlp.experts." not in n}
    write_file(folder / "model.safetensors", others | stacks)
    (folder / "config.json").write_bytes((saved[PER_EXPERT] / "config.json").read_bytes())
    again = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    again.save_pretrained(saved[FUSED])
    for spelling, path in saved.items():
        extra = mtp_tensors() if spelling == FUSED else spell_per_expert(mtp_tensors())
        write_file(path / "model.safetensors", read_file(path) | extra)
    return saved


def mtp_tensors() -> Tensors:
    """One MTP layer: the 19 tensors of the published checkpoints, whose experts are fused."""
    heads, kv, dim = (TEXT[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    h, i = HIDDEN, INTER
    layer = "mtp.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "mtp.fc.weight": (h, 2 * h),
        **{f"mtp.{n}.weight": (h,) for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")},
        **{f"{layer}{n}_layernorm.weight": (h,) for n in ("input", "post_attention")},
        f"{layer}self_attn.q_proj.weight": (2 * heads * dim, h),
        f"{layer}self_attn.k_proj.weight": (kv * dim, h),
        f"{layer}self_attn.v_proj.weight": (kv * dim, h),
        f"{layer}self_attn.o_proj.weight": (h, heads * dim),
        **{f"{layer}self_attn.{n}_norm.weight": (dim,) for n in "qk"},
        f"{layer}mlp.gate.weight": (EXPERTS, h),
        f"{layer}mlp.experts.gate_up_proj": (EXPERTS, 2 * i, h),
        f"{layer}mlp.experts.down_proj": (EXPERTS, h, i),
        f"{layer}mlp.shared_expert.gate_proj.weight": (i, h),
        f"{layer}mlp.shared_expert.up_proj.weight": (i, h),
        f"{layer}mlp.shared_expert.down_proj.weight": (h, i),
        f"{layer}mlp.shared_expert_gate.weight": (1, h),
    }
    return {name: _values(name, shape) for name, shape in shapes.items()}


def decoded(path: Path) -> Tensors:
    """Every weight of a checkpoint by NumPy, experts fused."""
    checkpoint = Checkpoint.open(path)
    with Reader(checkpoint.inventory) as reader:
        return {w.name: np.asarray(checkpoint.read(reader, w)) for w in checkpoint.weights}


def write_dense(folder: Path, tensors: Tensors, source: Path) -> Path:
    """A checkpoint of plain tensors with the configuration of ``source``, but for its dtype: FP32."""
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
        part.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    write_file(folder / "model.safetensors", {name: array.astype(np.float32) for name, array in tensors.items()})
    return folder


def inputs(image: bool) -> dict[str, torch.Tensor]:
    """Tokens and, with ``image``, the patches of a picture of 16 x 16 pixels that four of the tokens stand for."""
    ids = [5, 6, 92, *[IMAGE] * 4, 93, 7, 8, 9, 10] if image else [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 20, 30]
    found = {"input_ids": torch.tensor([ids])}
    if image:
        patches = np.random.default_rng(3).standard_normal((16, 3 * 2 * 4 * 4)).astype(np.float32)
        grid = torch.tensor([[1, 4, 4]])
        found |= {"pixel_values": torch.from_numpy(patches), "image_grid_thw": grid}
        found["mm_token_type_ids"] = (found["input_ids"] == IMAGE).int()
    return found


def _values(name: str, shape: tuple[int, ...]) -> Any:
    """Heavy-tailed values in BF16 that depend on the name alone; norms, decays and biases near their usual size."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = heavy_tailed(rng, *shape)
    if name.endswith("A_log"):
        return np.log(rng.uniform(1, 8, shape)).astype(values.dtype)
    if name.endswith("dt_bias") or "linear_attn.norm" in name:
        return (1 + values.astype(np.float32)).astype(values.dtype)
    return (4 * values.astype(np.float32)).astype(values.dtype) if len(shape) > 1 else values
