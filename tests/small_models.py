"""Small checkpoints with the names and pitfalls of real ones, and a plan and conversion of them in one call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from halfbyte.checkpoint import build_header, safetensors_name
from halfbyte.convert.conversion import convert
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.recipes import Recipe, list_recipes, load_recipe
from halfbyte.source.checkpoint import Checkpoint

Tensors = dict[str, NDArray[Any]]

# built-in recipes that need to know nothing but the weights
DATA_FREE = [name for name in list_recipes() if not load_recipe(name).needs_calibration]

HIDDEN, INTER, EXPERTS, VOCAB = 128, 128, 4, 64
MOE_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_5_moe_text",
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTER,
        "num_experts": EXPERTS,
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "vocab_size": VOCAB,
    },
}
DENSE_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
SIDE_FILES = {"tokenizer.json": b'{"a": 1}', "generation_config.json": b"{}", "chat_template.jinja": b"{{ x }}"}


def heavy_tailed(rng: np.random.Generator, *shape: int) -> NDArray[Any]:
    """BF16 values with outliers, as trained weights have them."""
    return np.asarray(rng.standard_t(4, shape) * 0.02).astype(ml_dtypes.bfloat16)


def moe_tensors(per_expert: bool = False, seed: int = 0) -> Tensors:
    """Qwen3.5-MoE in small: linear and full attention, shared and routed experts, vision, MTP; one seed, one model."""
    rng = np.random.default_rng(seed)
    h, i = HIDDEN, INTER
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (VOCAB, h)}
    text = "model.language_model."
    shapes |= {f"{text}embed_tokens.weight": (VOCAB, h), f"{text}norm.weight": (h,)}
    linear = {
        "in_proj_qkv.weight": (2 * h, h),
        "in_proj_z.weight": (h, h),
        "in_proj_a.weight": (8, h),
        "in_proj_b.weight": (8, h),
        "conv1d.weight": (2 * h, 1, 4),
        "A_log": (8,),
        "dt_bias": (8,),
        "norm.weight": (16,),
        "out_proj.weight": (h, h),
    }
    shapes |= {f"{text}layers.0.linear_attn.{name}": shape for name, shape in linear.items()}
    for prefix in (f"{text}layers.0.", f"{text}layers.1.", "mtp.layers.0."):
        if prefix != f"{text}layers.0.":
            shapes |= {
                f"{prefix}self_attn.{p}_proj.weight": (n, h) for p, n in zip("qkvo", (2 * h, 64, 64, h), strict=True)
            }
            shapes |= {f"{prefix}self_attn.{p}_norm.weight": (32,) for p in "qk"}
        shapes |= {f"{prefix}{p}_layernorm.weight": (h,) for p in ("input", "post_attention")}
        shapes |= {f"{prefix}mlp.gate.weight": (EXPERTS, h), f"{prefix}mlp.shared_expert_gate.weight": (1, h)}
        shapes |= {f"{prefix}mlp.shared_expert.{p}_proj.weight": (i, h) for p in ("gate", "up")}
        shapes[f"{prefix}mlp.shared_expert.down_proj.weight"] = (h, i)
        shapes[f"{prefix}mlp.experts.gate_up_proj"] = (EXPERTS, 2 * i, h)
        shapes[f"{prefix}mlp.experts.down_proj"] = (EXPERTS, h, i)
    shapes |= {"mtp.fc.weight": (h, 2 * h), "mtp.norm.weight": (h,)}
    shapes |= {f"mtp.pre_fc_norm_{p}.weight": (h,) for p in ("embedding", "hidden")}
    vision = {
        "blocks.0.attn.qkv.weight": (3 * 32, 32),
        "blocks.0.attn.proj.weight": (32, 32),
        "blocks.0.attn.proj.bias": (32,),
        "blocks.0.mlp.linear_fc1.weight": (48, 32),
        # 48 is a multiple of 16 and not of 32, as 4304 in the real model
        "blocks.0.mlp.linear_fc2.weight": (32, 48),
        "blocks.0.norm1.weight": (32,),
        "patch_embed.proj.weight": (32, 3, 2, 16, 16),
        "pos_embed.weight": (16, 32),
        "merger.linear_fc1.weight": (64, 64),
    }
    shapes |= {f"model.visual.{name}": shape for name, shape in vision.items()}
    tensors = {name: heavy_tailed(rng, *shape) for name, shape in shapes.items()}
    return spell_per_expert(tensors) if per_expert else tensors


def spell_per_expert(tensors: Mapping[str, NDArray[Any]]) -> Tensors:
    """The same model with one tensor per expert and projection."""
    result: Tensors = {}
    for name, array in tensors.items():
        base, _, last = name.rpartition(".")
        if not base.endswith("mlp.experts"):
            result[name] = array
            continue
        parts = np.split(array, 2, axis=1) if last == "gate_up_proj" else [array]
        for e in range(len(array)):
            for part, values in zip(("gate", "up") if len(parts) == 2 else ("down",), parts, strict=True):
                result[f"{base}.{e}.{part}_proj.weight"] = np.ascontiguousarray(values[e])
    return result


def dense_tensors(seed: int = 0, tied: bool = False, inter: int = 256) -> Tensors:
    """Qwen3 in small, with a stored lm_head (tied: the same values as the embedding)."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.{p}_proj.weight": (n, HIDDEN)
            for p, n in zip("qkvo", (HIDDEN, 64, 64, HIDDEN), strict=True)
        }
        shapes |= {f"{prefix}mlp.{p}_proj.weight": (inter, HIDDEN) for p in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, inter)
        shapes[f"{prefix}input_layernorm.weight"] = (HIDDEN,)
    tensors = {name: heavy_tailed(rng, *shape) for name, shape in shapes.items()}
    tensors["lm_head.weight"] = (
        tensors["model.embed_tokens.weight"].copy() if tied else heavy_tailed(rng, VOCAB, HIDDEN)
    )
    return tensors


def write_file(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """One safetensors file."""
    layout = build_header([(name, safetensors_name(a.dtype), a.shape) for name, a in tensors.items()])
    path.write_bytes(layout.header + b"".join(a.tobytes() for a in tensors.values()))


def write_checkpoint(folder: Path, tensors: Tensors, config: Mapping[str, Any], shards: int = 1) -> Path:
    """A checkpoint folder with tokenizer files; with more than one shard also an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in SIDE_FILES.items():
        (folder / name).write_bytes(content)
    if shards == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    weight_map = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[k * len(names) // shards : (k + 1) * len(names) // shards]
        write_file(folder / file, {name: tensors[name] for name in mine})
        weight_map |= dict.fromkeys(mine, file)
    total = sum(a.nbytes for a in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_file(path: Path) -> Tensors:
    """All tensors of a checkpoint folder or file, through halfbyte's reader."""
    from halfbyte.checkpoint import Inventory, Reader

    inventory = Inventory.open(path)
    with Reader(inventory) as reader:
        return {name: reader.read(name) for name in inventory.tensors}


def recipe(*rules: Mapping[str, Any], name: str = "test", dialect: str | None = None) -> Recipe:
    """A recipe from rules as a YAML file would hold them."""
    return Recipe.model_validate({"name": name, "dialect": dialect, "rules": [dict(rule) for rule in rules]})


def linear(fmt: str, **more: Any) -> Recipe:
    """All Linear weights of the main model in one format, by absmax, which is quick."""
    return recipe({"match": "linear", "format": fmt, "scale_search": "absmax", **more})


def run(source: Path, out: Path, what: str | Recipe, dialect: str = "halfbyte", **more: Any) -> Plan:
    """Plan and convert with one worker."""
    threads = more.pop("threads", 1)
    plan = make_plan(Checkpoint.open(source), what, dialect, **more)
    convert(plan, out, threads=threads)
    return plan


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def without_checksums(out: Path) -> Path:
    """An output as releases before 0.2 wrote it: its halfbyte.json holds no hashes, so it can be tampered with."""
    path = out / "halfbyte.json"
    record = json.loads(path.read_bytes())
    for key in ("plan", "files", "sha256"):
        del record[key]
    del record["source"]["sample"]
    path.write_text(json.dumps({**record, "halfbyte": 2}, indent=2))
    return out
