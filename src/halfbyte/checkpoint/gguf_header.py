"""The headers of GGUF files: tensors, their ggml types, and as much of a config.json as the metadata tells.

The library gguf parses them; blocks appear as U8 tensors whose rows are rows of blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """What the files say. files: name -> bytes; metadata: every key of the first file."""

    tensors: dict[str, TensorInfo]
    types: dict[str, str]
    files: dict[str, int]
    metadata: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """A config.json with what the metadata tells; {} for an architecture that is not known."""
        arch = self.metadata.get("general.architecture")
        if arch not in _ARCHITECTURES:
            return {}
        config: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[arch]],
            "model_type": {"qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss"}.get(arch, arch),
            "tie_word_embeddings": "output.weight" not in self.tensors,
        }
        for key, name in _KEYS.items():
            if f"{arch}.{key}" in self.metadata:
                config[name] = self.metadata[f"{arch}.{key}"]
        return config


def find_gguf(root: Path, only: str | None) -> list[str]:
    """The GGUF files that a source means: the named one with its splits, or those of a folder without safetensors."""
    if only is not None:
        return _splits(root, only) if only.endswith(SUFFIX) else []
    names = sorted(path.name for path in root.iterdir() if path.is_file())
    if any(name.endswith(".safetensors") for name in names):
        return []
    found = [name for name in names if name.endswith(SUFFIX)]
    if not found:
        return []
    parts = _splits(root, found[0])
    if parts != found:
        raise CheckpointError(f"{root} holds several GGUF models ({', '.join(found[:4])}); name the file to read")
    return parts


def read_gguf(root: Path, names: list[str]) -> GgufHeaders:
    """Tensors and metadata of the files of one model; CheckpointError for a damaged or incomplete one."""
    found = GgufHeaders({}, {}, {}, {})
    for number, name in enumerate(names):
        try:
            reader = _library().GGUFReader(root / name)
            size = (root / name).stat().st_size
            for info, kind in _tensors(reader, name):
                if info.offset + info.nbytes > size:
                    raise CheckpointError(f"{name} is truncated: {info.name} would end after its {size} bytes")
                if info.name in found.tensors:
                    raise CheckpointError(f"tensor {info.name} is in both {found.tensors[info.name].file} and {name}")
                found.tensors[info.name] = info
                found.types[info.name] = kind
            if number == 0:
                found.metadata = {key: field.contents() for key, field in reader.fields.items()}
        except CheckpointError:
            raise
        except Exception as error:  # a damaged file fails in the library wherever it is damaged
            raise CheckpointError(f"{name} is no GGUF file or is damaged ({type(error).__name__}: {error})") from error
        found.files[name] = size
    stated = found.metadata.get("split.tensors.count", len(found.tensors))
    if stated != len(found.tensors):
        raise CheckpointError(f"{names[0]} and its splits hold {len(found.tensors)} tensors, but {stated} are stated")
    return found


def _tensors(reader: Any, file: str) -> Iterator[tuple[TensorInfo, str]]:
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        shape = [int(n) for n in reversed(tensor.shape)]
        if kind not in _PLAIN:
            block, size = _library().GGML_QUANT_SIZES[tensor.tensor_type]
            shape[-1] = shape[-1] // block * size
        info = TensorInfo(
            tensor.name,
            kind if kind in _PLAIN else "U8",
            tuple(shape),
            file,
            int(tensor.data_offset),
            int(tensor.n_bytes),
        )
        yield info, kind


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


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "reading GGUF files needs the library gguf; install it with: pip install 'halfbyte[gguf]'"
        ) from error
    return gguf
