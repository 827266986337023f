"""The headers of GGUF files: tensors, their ggml types, and as much of a config.json as the metadata tells.

Blocks appear as U8 tensors whose rows are rows of blocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.config import check_config
from halfbyte.checkpoint.files import check_link
from halfbyte.checkpoint.gguf_parser import GGML_SIZES, GgufTensor, parse_gguf
from halfbyte.checkpoint.header import TensorInfo
from halfbyte.errors import CheckpointError

SUFFIX = ".gguf"
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# ggml types that safetensors calls the same
_PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
# general.architecture -> architectures of config.json; and the keys that families look at
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
}
_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "rope.freq_base": "rope_theta",
}


@dataclass
class GgufHeaders:
    """What the files say. files: name -> bytes; metadata: every key of the first file, which is named ``file``."""

    file: str
    tensors: dict[str, TensorInfo]
    types: dict[str, str]
    files: dict[str, int]
    metadata: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """A config.json with what the metadata tells; {} for an architecture that is not known."""
        arch = self.metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in _ARCHITECTURES:
            return {}
        config: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[arch]],
            "model_type": {"qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss"}.get(arch, arch),
            "tie_word_embeddings": "output.weight" not in self.tensors,
        }
        for key, name in _KEYS.items():
            if f"{arch}.{key}" in self.metadata:
                config[name] = self.metadata[f"{arch}.{key}"]
        check_config(config, f"the metadata of {self.file}")
        return config


def find_gguf(root: Path, only: str | None) -> list[str]:
    """The GGUF files that a source means: the named one with its splits, or those of a folder without safetensors."""
    if only is not None:
        return _splits(root, only) if only.endswith(SUFFIX) else []
    names = sorted(path.name for path in root.iterdir() if path.is_file())
    if any(name.endswith(".safetensors") for name in names):
        return []
    files = [name for name in names if name.endswith(SUFFIX)]
    if not files:
        return []
    parts = _splits(root, files[0])
    if parts != files:
        raise CheckpointError(f"{root} holds several GGUF models ({', '.join(files[:4])}); name the file to read")
    return parts


def read_gguf(root: Path, names: list[str]) -> GgufHeaders:
    """Tensors and metadata of the files of one model; CheckpointError for a damaged or incomplete one."""
    headers = GgufHeaders(names[0], {}, {}, {}, {})
    for number, name in enumerate(names):
        check_link(root, root / name)
        parsed = parse_gguf(root / name)
        for tensor in parsed.tensors:
            if tensor.name in headers.tensors:
                raise CheckpointError(f"tensor {tensor.name} is in both {headers.tensors[tensor.name].file} and {name}")
            headers.tensors[tensor.name] = _info(tensor, name)
            headers.types[tensor.name] = tensor.kind
        if number == 0:
            headers.metadata = parsed.metadata
            _check_kind(name, parsed.metadata.get("general.type", "model"))
        headers.files[name] = parsed.size
    if not headers.tensors:
        raise CheckpointError(f"{names[0]} holds no tensor")
    stated = headers.metadata.get("split.tensors.count", len(headers.tensors))
    if stated != len(headers.tensors):
        raise CheckpointError(f"{names[0]} and its splits hold {len(headers.tensors)} tensors, but {stated} are stated")
    return headers


def _check_kind(name: str, kind: Any) -> None:
    """Refuse files that hold something else than a model."""
    kinds = {
        "adapter": "an adapter (LoRA), not a model",
        "mmproj": "the vision or audio part of a model, not a language model",
        "imatrix": "an importance matrix, not a model; give it as --importance",
        "vocab": "a vocabulary without weights",
    }
    if isinstance(kind, str) and kind in kinds:
        raise CheckpointError(f"{name} holds {kinds[kind]}")


def _info(tensor: GgufTensor, file: str) -> TensorInfo:
    if tensor.kind in _PLAIN:
        return TensorInfo(tensor.name, tensor.kind, tensor.shape, file, tensor.offset, tensor.nbytes)
    block, size = GGML_SIZES[tensor.kind]
    shape = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
    return TensorInfo(tensor.name, "U8", shape, file, tensor.offset, tensor.nbytes)


def _splits(root: Path, name: str) -> list[str]:
    match = _SPLIT.fullmatch(name)
    if not match:
        return [name]
    count = int(match["count"])
    names = [f"{match['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    missing = [n for n in names if not (root / n).is_file()]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing from {root}, and {name} is one of its {count} parts")
    return names
