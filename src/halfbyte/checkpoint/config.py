"""config.json: read, checked where halfbyte relies on it, and searched for the configurations inside of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from halfbyte.checkpoint.files import parse_object
from halfbyte.checkpoint.foreign import Fields, check_plain
from halfbyte.checkpoint.store import Store

CONFIG = "config.json"
#: Where config.json says how a checkpoint is quantized: the usual key, an older one, MLX's, those of other tools.
QUANTIZATION = ("quantization_config", "compression_config", "quantization", "quant_config", "quantize_config")

# the configuration of a composite model's language model
_TEXT = ("text_config", "llm_config", "language_config", "thinker_config", "llm", "language_model_config")
_OBJECTS = (*QUANTIZATION, *_TEXT[:4], "vision_config", "auto_map", "rope_scaling", "rope_parameters")
# what only configurations have
_MARKS = ("model_type", "architectures", *QUANTIZATION)
_COUNTS = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "moe_intermediate_size", "moe_latent_size"),
    *("num_experts", "n_routed_experts", "num_local_experts", "num_experts_per_tok", "full_attention_interval"),
)


def read_config(store: Store) -> dict[str, Any]:
    """Read a store's config.json, {} where there is none; CheckpointError where a value is of a wrong type."""
    if not store.exists(CONFIG):
        return {}
    store.check(CONFIG)
    where = f"{store.place}/{CONFIG}"
    # not strict: configs of real models contain Infinity
    config = parse_object(store.read_small(CONFIG), where, strict=False)
    check_config(config, where)
    return config


def check_config(config: Mapping[str, Any], file: str) -> None:
    """Refuse a configuration that cannot be written again, or whose known keys have values of wrong types."""
    check_plain(config, file)
    for place, part in parts_of(config):
        fields = Fields(part, file, place)
        for key in _OBJECTS:
            fields.fields(key)
        for key in QUANTIZATION:
            fields.fields(key).text("quant_method")
        fields.texts("architectures")
        fields.text("model_type")
        fields.flag("tie_word_embeddings")
        for key in _COUNTS:
            value = part.get(key)
            # per layer in some models
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, int | float) and not isinstance(item, bool):
                    Fields({key: item}, file, place).number(key)
                elif item is not None:
                    raise fields.wrong(key, "a number")


def parts_of(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Give a configuration and every configuration inside of it, with their places; text models come first."""
    level = [(place, config)]
    while level:
        yield from level
        level = [
            (f"{outer}.{key}" if outer else key, inner)
            for outer, part in level
            for key, value in sorted(part.items(), key=lambda entry: entry[0] not in _TEXT)
            if key not in QUANTIZATION
            for key, inner in _configs(key, value)
        ]


def _configs(key: str, value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Give what is a configuration by its key or by its content: a value, or members of a list."""
    if isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _configs(f"{key}[{number}]", inner)
    elif isinstance(value, Mapping) and (key.endswith("config") or key in _TEXT or _is_marked(value)):
        yield key, value


def _is_marked(value: Any) -> bool:
    """Whether a value has, at any depth, what only configurations have."""
    if isinstance(value, list):
        return any(_is_marked(inner) for inner in value)
    if not isinstance(value, Mapping):
        return False
    return any(mark in value for mark in _MARKS) or any(_is_marked(inner) for inner in value.values())


def text_parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A configuration and those of its language model, the outermost first."""
    parts = [config]
    for part in parts:
        parts += [part[key] for key in _TEXT if isinstance(part.get(key), Mapping)]
    return parts
