"""Small right files of every kind, made here, from which cases are mutated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import halfbyte
from halfbyte.calibration.imatrix import write_dat, write_gguf
from halfbyte.calibration.importance import Importance, add_entry
from halfbyte.calibration.importance_file import write_importance
from halfbyte.checkpoint import build_header
from halfbyte.recipes import load_recipe

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def model(folder: Path) -> Path:
    """A Llama of one layer."""
    rng = np.random.default_rng(0)
    prefix = "model.layers.0."
    shapes = {f"{prefix}self_attn.{part}_proj.weight": (32, 32) for part in "qkvo"}
    shapes |= {f"{prefix}mlp.{part}_proj.weight": (64, 32) for part in ("gate", "up")}
    shapes |= {f"{prefix}mlp.down_proj.weight": (32, 64), "lm_head.weight": (16, 32)}
    shapes["model.embed_tokens.weight"] = (16, 32)
    arrays = {name: (rng.standard_normal(shape) * 0.05).astype(np.float32) for name, shape in shapes.items()}
    norms = [f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight", "model.norm.weight"]
    arrays |= {name: np.ones(32, np.float32) for name in norms}
    folder.mkdir(parents=True)
    layout = build_header([(name, "F32", array.shape) for name, array in arrays.items()])
    (folder / "model.safetensors").write_bytes(layout.header + b"".join(a.tobytes() for a in arrays.values()))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def plain_file() -> bytes:
    """A safetensors file with tensors of several types and shapes, an empty one among them."""
    layout = build_header([("a.weight", "BF16", (3, 2)), ("b", "F8_E4M3", (5,)), ("s", "F32", ()), ("n", "BOOL", (0,))])
    return layout.header + bytes(range(layout.total - len(layout.header)))


def outputs(folder: Path, source: Path) -> list[Path]:
    """The model in NVFP4 in three dialects."""
    recipe = load_recipe("nvfp4")
    for dialect in ("halfbyte", "compressed-tensors", "modelopt"):
        halfbyte.quantize(str(source), folder / dialect, recipe, dialect=dialect)
    return sorted(folder.iterdir())


def importance_files(folder: Path) -> list[Path]:
    """The same importance in the three kinds of files."""
    known = Importance({}, {})
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_down.weight"):
        add_entry(known, name, np.ones((1, 32)), np.array([4]), "corpus")
    folder.mkdir()
    write_importance(known, folder / "a.safetensors")
    write_dat(known, folder / "imatrix.dat")
    write_gguf(known, folder / "imatrix.gguf")
    return [folder / name for name in ("a.safetensors", "imatrix.dat", "imatrix.gguf")]


CONVERSATIONS = [
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 2,
    b'[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]',
]
RECIPES = [
    b"name: r\nrules:\n  - match: linear\n    format: nvfp4\n    scale_search: sweep\n",
    b"name: r\ndialect: mlx\nkv_cache: fp8\nrules:\n  - match: [experts, 're:^a.*$']\n    format: int4_g32\n"
    b"    rounding: gptq\n    damping: 0.01\n  - {match: lm_head, keep: true, reason: x}\n",
]
JOURNAL = (
    b'{"journal": 2, "fingerprint": "f", "source": {"a": {"bytes": 1}}, "recipe": {"rules": []}}\n'
    b'{"file": "model.safetensors", "nbytes": 5, "extra": {"sha256": "00", "errors": []}}\n'
)
INDEX = json.dumps(
    {"metadata": {"total_size": 21}, "weight_map": dict.fromkeys(("a.weight", "b", "s", "n"), "m.safetensors")}
).encode()
ERRORS = {
    "halfbyte": "errors",
    "errors": [
        {
            "out": "a",
            "against": "b",
            "weights": [
                {"name": "w", "role": "mlp.up", "layer": 0, "format": "nvfp4", "parameters": 9, "relmse": 0.01}
            ],
            "classes": [{"role": "mlp.up", "format": "nvfp4", "parameters": 9, "tables": {"e2m1": 1.0}}],
            "total": {"parameters": 9, "bytes": 5, "bits": 4.5, "relmse": 0.01},
        }
    ],
}
_RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "models" / "qwen3-tiny-wiki.json"


def results() -> list[bytes]:
    """A results file of the benchmarks, cut to two checkpoints, and an errors file."""
    document = json.loads(_RESULTS.read_bytes())
    document["rows"] = document["rows"][:2]
    return [json.dumps(document).encode(), json.dumps(ERRORS).encode()]
