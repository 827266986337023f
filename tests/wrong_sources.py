"""Small checkpoints of every dialect, and what is done with each when its JSON files hold wrong types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import halfbyte
from collected import with_caches
from dialects.gguf_models import checkpoint as gguf_checkpoint
from halfbyte.api import respelling
from halfbyte.calibration import read_importance
from halfbyte.calibration.model_identity import identity_of
from halfbyte.source.checkpoint import Checkpoint
from quantized_sources import gpt_oss, kimi
from small_models import (
    DENSE_CONFIG,
    MOE_CONFIG,
    dense_tensors,
    linear,
    moe_tensors,
    run,
    write_checkpoint,
)

Use = Callable[[Path], object]
Source = tuple[str, Callable[[Path], Path], tuple[Use, ...]]


def inspect(folder: Path) -> object:
    return halfbyte.inspect(str(folder))


def plan(folder: Path) -> object:
    return halfbyte.plan(str(folder), "nvfp4", dialect="compressed-tensors").summary()


def plan_gguf(folder: Path) -> object:
    return halfbyte.plan(str(folder), linear("mxfp4"), dialect="gguf").summary()


def plan_mlx(folder: Path) -> object:
    return halfbyte.plan(str(folder), linear("mxfp4"), dialect="mlx").summary()


def respell(folder: Path) -> object:
    other = "halfbyte" if Checkpoint.open(folder).dialect is None else "compressed-tensors"
    return respelling(str(folder), other).summary()


def respell_own(folder: Path) -> object:
    return respelling(str(folder), "halfbyte").summary()


def verify(folder: Path) -> object:
    return halfbyte.verify(str(folder))


def verify_against(folder: Path) -> object:
    return halfbyte.verify(str(folder), str(folder.with_name(f"{folder.name}-bf16")))


def importance(folder: Path) -> object:
    return read_importance(folder)


def plan_calibrated(folder: Path) -> object:
    return halfbyte.plan(str(folder.with_name(f"{folder.name}-model")), "nvfp4", importance=str(folder)).summary()


MORE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
    "auto_map": {"AutoConfig": "a.B"},
    "layer_types": ["full_attention", "full_attention"],
}


def dense(folder: Path) -> Path:
    write_checkpoint(folder, dense_tensors(), {**DENSE_CONFIG, **MORE}, shards=2)
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 20, "temperature": 0.6, "eos_token_id": [1]}))
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "a"}, "quantization": {}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"1": {"content": "a"}}}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 5}}))
    return folder


def composite(folder: Path) -> Path:
    return write_checkpoint(folder, moe_tensors(), {**MOE_CONFIG, "vision_config": {"model_type": "v", "depth": 2}})


def written(recipe: Any, dialect: str, tensors: Callable[[], Any] = dense_tensors, config: Any = None) -> Any:
    def make(folder: Path) -> Path:
        source = write_checkpoint(folder.with_name(f"{folder.name}-bf16"), tensors(), config or DENSE_CONFIG | MORE)
        run(source, folder, recipe, dialect)
        return folder

    return make


def fp8(folder: Path) -> Path:
    tensors = dense_tensors()
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = np.zeros((rows, columns), ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = np.ones((-(-rows // 128), -(-columns // 128)), np.float32)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    settings["modules_to_not_convert"] = ["lm_head"]  # type: ignore[assignment]
    return write_checkpoint(folder, tensors, {**DENSE_CONFIG, "quantization_config": settings})


def statistics(folder: Path) -> Path:
    model = write_checkpoint(folder.with_name(f"{folder.name}-model"), dense_tensors(), DENSE_CONFIG | MORE)
    about = with_caches(folder, model, {}) / "statistics.json"
    source = {"name": "m", "identity": identity_of(Checkpoint.open(model)), "revision": None}
    about.write_text(json.dumps(json.loads(about.read_text()) | {"source": source, "texts": ["t"], "length": 5}))
    return folder


SOURCES: list[Source] = [
    ("dense", dense, (inspect, plan, plan_mlx)),
    ("composite", composite, (inspect, plan, plan_mlx)),
    ("llama", lambda f: gguf_checkpoint(f, "llama"), (plan_gguf,)),
    ("qwen3moe", lambda f: gguf_checkpoint(f, "qwen3moe"), (inspect, plan_gguf, plan_mlx)),
    ("gpt-oss", gpt_oss, (inspect, respell, plan)),
    ("kimi", kimi, (inspect, respell_own, plan)),
    ("compressed-tensors", written("nvfp4", "compressed-tensors"), (inspect, respell_own)),
    ("halfbyte", written("nvfp4", "halfbyte"), (inspect, respell)),
    ("modelopt", written("nvfp4", "modelopt"), (inspect, respell)),
    ("mlx", written("ud-q4", "mlx"), (inspect, respell_own)),
    ("fp8", fp8, (inspect, respell_own)),
    ("verify", written("nvfp4", "compressed-tensors"), (verify, verify_against)),
    ("verify-modelopt", written("nvfp4", "modelopt"), (verify, verify_against)),
    ("statistics", statistics, (plan_calibrated, importance)),
]
"""Name, how it is made, what is done with it."""
