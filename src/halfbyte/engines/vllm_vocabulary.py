"""vLLM's embeddings and output weights that stay as they lie in the checkpoint; one matrix may be both."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from halfbyte.engines.vllm_linear import HalfbyteLinearMethod, Part
from halfbyte.engines.vllm_ops import look_up
from halfbyte.runtime.ops import run_linear


class HalfbyteVocabularyMethod(HalfbyteLinearMethod):
    """Looks up rows of a matrix and multiplies with it; rows of other ranks and padding are not in memory."""

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **attributes: Any) -> None:
        """Find this rank's rows; where they cannot be multiplied with as they are, the layer is unquantized."""
        (weight,), columns = self.weights, sizes[2]
        rows = layer.shard_indices
        part = Part(weight, rows.org_vocab_start_index, rows.org_vocab_end_index, 0, columns)
        whole = weight.shape == (layer.org_vocab_size, columns) and not rows.num_added_elements
        if whole and part.first < part.stop and part.fits(self.checkpoint):
            self.parts = [part]
        else:
            layer.quant_method = UnquantizedEmbeddingMethod()
            layer.quant_method.create_weights(layer, *sizes, **attributes)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits of this rank's tokens; those of padding are 0."""
        y = run_linear(x, self.product, self.mode)
        missing = layer.num_embeddings_per_partition - self.product.n
        y = torch.nn.functional.pad(y, (0, missing)) if missing else y
        return y if bias is None else y + bias

    def embedding(self, layer: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of tokens, in the type that the model computes in."""
        return look_up(ids, layer.halfbyte_product, self.product, layer.params_dtype)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Return the layer that stands for a head: the embeddings themselves."""
        return embed_tokens


class TiedHeadMethod(UnquantizedEmbeddingMethod):
    """The head of a model whose embeddings may turn out to be packed."""

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Return the layer that stands for the head: the embeddings where these are packed."""
        if isinstance(embed_tokens.quant_method, HalfbyteVocabularyMethod):
            return embed_tokens
        return super().tie_weights(layer, embed_tokens)
