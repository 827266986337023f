"""Keys of a quantization_config that no reader knows but that look like one that all readers know: misspelt ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

# What the writers of these dialects use, at any depth: compressed-tensors' QuantizationConfig, QuantizationScheme and
# QuantizationArgs; ModelOpt's exported hf_quant_config.json; transformers' FineGrainedFP8Config and Mxfp4Config;
# mlx-lm's quantization; halfbyte's own.
_COMPRESSED_TENSORS = (
    "quant_method config_groups format quantization_status global_compression_ratio ignore kv_cache_scheme "
    "sparsity_config transform_config version targets weights input_activations output_activations num_bits type "
    "symmetric group_size strategy block_structure dynamic actorder scale_dtype zp_dtype observer observer_kwargs"
)
_MODELOPT = (
    "producer name quantization quant_algo kv_cache_quant_algo exclude_modules quantized_layers has_zero_point "
    "pre_quant_scale"
)
_FP8 = "fmt activation_scheme weight_block_size scale_fmt modules_to_not_convert ignored_layers"
_KNOWN = frozenset(f"{_COMPRESSED_TENSORS} {_MODELOPT} {_FP8}".split())
# below these, keys are names of modules, groups or formats
_NAMED = frozenset({"config_groups", "quantized_layers", "formats", "weights_by_name", "transform_config"})


def misspelt_keys(settings: Mapping[str, Any], where: str, known: frozenset[str] = frozenset()) -> list[str]:
    """One sentence for every key that is one letter or so away from a known one; ``known``: more of these."""
    everything = sorted(_KNOWN | known)
    problems = []
    for key in _keys(settings):
        if key in everything or key.count("."):
            continue
        near = difflib.get_close_matches(key, everything, n=1, cutoff=0.75)
        if near and abs(len(near[0]) - len(key)) <= 1:
            problems.append(f"{where} has the key {key!r}, which nothing reads; it should be {near[0]!r}")
    return problems


def _keys(value: Any, named: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not named:
                yield str(key)
            yield from _keys(inner, not named and key in _NAMED)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)
