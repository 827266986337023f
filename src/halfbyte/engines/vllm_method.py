"""vLLM's quantization method ``halfbyte``: every layer is an unquantized one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.platforms import current_platform

from halfbyte.engines.vllm_claims import METHOD, fp8_cache, takes_over


class HalfbyteConfig(QuantizationConfig):
    """Weights are decoded before they arrive at the layers, so that nothing is left to do for these.

    ``kv_cache_scheme`` is where attention layers look whether a checkpoint wants its cache in FP8.
    """

    def __init__(self, kv_cache_scheme: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.kv_cache_scheme = kv_cache_scheme

    def get_name(self) -> str:
        """As in ``quantization="halfbyte"``."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What models compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU, or none."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """config.json says it all."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HalfbyteConfig:
        """What concerns weights the loader reads itself."""
        return cls(fp8_cache(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a checkpoint of another method, or not."""
        return METHOD if takes_over(hf_quant_cfg, user_quant, hf_config, current_platform.is_cpu()) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Model classes that load their own packed weights, as gpt-oss does, look for the method's name here."""
        settings = getattr(hf_config, "quantization_config", None)
        if isinstance(settings, dict):
            settings["quant_method"] = METHOD

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """That of unquantized layers; None stands for it where the layer is not linear. Caches are vLLM's own."""
        if isinstance(layer, Attention) and self.kv_cache_scheme:
            return BaseKVCacheMethod(self)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
