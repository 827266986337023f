"""vLLM's quantization method ``halfbyte``: which layer multiplies with packed weights, and which is unquantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from halfbyte.engines.vllm_claims import METHOD, fp8_cache, takes_over
from halfbyte.engines.vllm_device import keeps_packed_on
from halfbyte.engines.vllm_experts import HalfbyteMoEMethod
from halfbyte.engines.vllm_linear import HalfbyteLinearMethod
from halfbyte.engines.vllm_names import QuantizedModules, open_checkpoint
from halfbyte.engines.vllm_vocabulary import HalfbyteVocabularyMethod, TiedHeadMethod


class HalfbyteConfig(QuantizationConfig):
    """Linear layers and experts keep the checkpoint's codes; all other weights are decoded by the loader.

    They do so on CPUs, and on CUDA devices with Triton.

    ``kv_cache_scheme`` is where attention layers look whether a checkpoint wants its cache in FP8.
    """

    def __init__(self, kv_cache_scheme: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.kv_cache_scheme = kv_cache_scheme
        self.model: tuple[str, str | None] | None = None
        self.config: Any = None
        self.mappers: list[Any] = []
        self._modules: QuantizedModules | None = None

    def __getstate__(self) -> dict[str, Any]:
        # other processes open the checkpoint themselves
        return {**self.__dict__, "_modules": None}

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
        """What concerns weights the checkpoint itself says."""
        return cls(fp8_cache(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a checkpoint of another method, or not."""
        return METHOD if takes_over(hf_quant_cfg, user_quant, hf_config, current_platform.is_cpu()) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Remember where the checkpoint is.

        Model classes that load their own packed weights, as gpt-oss does, look for the method's name in hf_config.
        """
        self.model, self.config = (model_name, revision), hf_config
        settings = getattr(hf_config, "quantization_config", None)
        if isinstance(settings, dict):
            settings["quant_method"] = METHOD

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Remember how a model's modules are renamed."""
        self.mappers.append(hf_to_vllm_mapper)
        if self._modules is not None:
            self._modules.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of one layer; None stands for an unquantized one that is not linear. Caches are vLLM's own."""
        if isinstance(layer, Attention) and self.kv_cache_scheme:
            return BaseKVCacheMethod(self)
        if isinstance(layer, LinearBase):
            return self._packed(HalfbyteLinearMethod, prefix) or UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        return None

    @property
    def modules(self) -> QuantizedModules:
        """The checkpoint's quantized weights by vLLM's modules."""
        if self._modules is None:
            assert self.model is not None  # vLLM says it before it builds a model
            folder = get_current_vllm_config().load_config.download_dir
            self._modules = QuantizedModules(open_checkpoint(*self.model, folder), self.config)
            for mapper in self.mappers:
                self._modules.rename(mapper)
        return self._modules

    def _packed(self, kind: type[HalfbyteLinearMethod], prefix: str) -> HalfbyteLinearMethod | None:
        """The method of a layer all of whose weights can stay packed."""
        weights = self.modules.linear(prefix, self.packed_modules_mapping) if _keeps_packed() else []
        return kind(self.modules.checkpoint, weights, self.modules.mode) if weights else None

    def _vocabulary(self, layer: torch.nn.Module, prefix: str) -> Any:
        # a drafter compares the weights of its vocabulary with the model's
        if not current_platform.is_cpu() or get_current_vllm_config().speculative_config is not None:
            return None
        packed = self._packed(HalfbyteVocabularyMethod, prefix)
        return packed or (TiedHeadMethod() if isinstance(layer, ParallelLMHead) else None)

    def _experts(self, layer: torch.nn.Module, prefix: str) -> Any:
        pair = self.modules.experts(prefix) if _keeps_packed() else None
        if pair is None:
            return None
        method = HalfbyteMoEMethod(layer, self.modules.checkpoint, *pair)
        return method if method.parts else None


def _keeps_packed() -> bool:
    return keeps_packed_on(current_platform.device_type)
