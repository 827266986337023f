"""The multi-token-prediction head of a checkpoint as a module that drafts tokens for its model.

A head guesses token t+2 from the model's last hidden state at t and the embedding of token t+1; fed with its own
output and its own guess, it goes on. transformers drops these tensors; here they are read from the checkpoint, decoded
where they are quantized, and run through one decoder layer of the model's own class. Known are the spellings of
Qwen3-Next, Qwen3.5 and 3.6 (``mtp.*``) and of DeepSeek-V3 and GLM-4.5 (the layer after the last, with ``eh_proj``).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from halfbyte.checkpoint.reader import Reader
from halfbyte.errors import CheckpointError
from halfbyte.models import Weight
from halfbyte.source.checkpoint import Checkpoint

# name of the spelling -> the tensors beside the layer: what joins, the norms of its two inputs, the last norm
_QWEN = {
    "join": "mtp.fc.weight",
    "embedding_norm": "mtp.pre_fc_norm_embedding.weight",
    "hidden_norm": "mtp.pre_fc_norm_hidden.weight",
    "norm": "mtp.norm.weight",
}
_DEEPSEEK = {
    "join": "eh_proj.weight",
    "embedding_norm": "enorm.weight",
    "hidden_norm": "hnorm.weight",
    "norm": "shared_head.norm.weight",
}
_OPTIONAL = {"head": "shared_head.head.weight", "embedding": "embed_tokens.weight"}


class DraftHead(nn.Module):
    """The first multi-token-prediction layer of a checkpoint, in the dtype and on the device of its model.

    A step is ``joined`` of the ``embed``-dings of tokens and of states, then ``run_layer``, then ``states_and_logits``.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        """Read the head of ``checkpoint``, whose loaded model is ``model``; CheckpointError where there is none."""
        super().__init__()
        decoder = model.get_decoder()
        weights = _head_weights(checkpoint)
        names, prefix = spelling_of_head(checkpoint)
        config = copy.deepcopy(decoder.config)
        config._attn_implementation, config._experts_implementation = "eager", "eager"
        index = _full_attention(config)
        with torch.device("meta"):
            self.layer = type(decoder.layers[index])(config, index)
        like = model.get_input_embeddings().weight
        self._placement = (model.dtype, like.device)
        with Reader(checkpoint.inventory) as reader:
            tensors = {key: self._read(checkpoint, reader, weights[name]) for key, name in names.items()}
            inner = {
                name.removeprefix(prefix): self._read(checkpoint, reader, weight)
                for name, weight in weights.items()
                if name.startswith(prefix) and name not in names.values()
            }
        lacking = sorted(set(self.layer.state_dict()) - set(inner))
        if lacking:
            raise CheckpointError(f"{checkpoint.inventory.source}: its draft head lacks {prefix}{lacking[0]}")
        self.layer.load_state_dict({k: inner[k] for k in self.layer.state_dict()}, assign=True)
        self.join = _linear(tensors["join"])
        for key in ("embedding_norm", "hidden_norm", "norm"):
            norm = copy.deepcopy(decoder.norm)
            norm.weight = nn.Parameter(tensors[key], requires_grad=False)
            setattr(self, key, norm)
        self._rotary, self._embedding = [decoder.rotary_emb], [model.get_input_embeddings()]
        self._head = [_linear(tensors["head"]) if "head" in tensors else model.get_output_embeddings()]
        if "embedding" in tensors:
            self._embedding = [nn.Embedding.from_pretrained(tensors["embedding"])]
        # Qwen's next step reads what the head reads, DeepSeek's what its norm reads
        self._hands_on_normed = names["join"] == _QWEN["join"]
        self.eval()

    def _read(self, checkpoint: Checkpoint, reader: Reader, weight: Weight) -> torch.Tensor:
        dtype, device = self._placement
        values = checkpoint.read(reader, weight)
        if str(values.dtype) not in ("float32", "float16", "float64"):
            values = values.astype(np.float32)
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, T, K] of tokens [B, T]."""
        result: torch.Tensor = self._embedding[0](tokens)
        return result

    def joined(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What the layer reads: both inputs, normed, side by side, projected to one."""
        result: torch.Tensor = self.join(torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], -1))
        return result

    def run_layer(
        self, joined: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, **settings: Any
    ) -> torch.Tensor:
        """Run the decoder layer on rows [B, T, K]; ``settings`` are further arguments of the layer.

        ``positions`` [B, T] place each row; ``mask`` [B, 1, T, T] is 0 where a row may look, and very low elsewhere.
        """
        rotary = self._rotary[0](joined, positions)
        states = self.layer(joined, attention_mask=mask, position_ids=positions, position_embeddings=rotary, **settings)
        result: torch.Tensor = states[0] if isinstance(states, tuple) else states
        return result

    def run_cached(self, joined: torch.Tensor, first: int, cache: Any) -> torch.Tensor:
        """Run the decoder layer on rows [1, T, K] behind those in ``cache``, which then has them too.

        The rows stand at positions ``first``, ``first`` + 1, ...; as many rows must be in the cache.
        """
        count = joined.shape[1]
        positions = torch.arange(first, first + count, device=joined.device)[None]
        mask = torch.zeros(count, first + count, dtype=joined.dtype, device=joined.device)
        later = torch.ones_like(mask, dtype=torch.bool).triu(first + 1)
        mask = mask.masked_fill(later, torch.finfo(joined.dtype).min)[None, None]
        return self.run_layer(joined, positions, mask, past_key_values=cache)

    def states_and_logits(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the layer's output: what the next step reads, and logits."""
        normed = self.norm(states)
        return (normed if self._hands_on_normed else states), self._head[0](normed)


def _head_weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    return {w.name: w for w in checkpoint.weights if w.role.removeprefix("quantized.").startswith("mtp.")}


def spelling_of_head(checkpoint: Checkpoint) -> tuple[dict[str, str], str]:
    """Names of the tensors beside the layer, and the prefix of those of the layer.

    CheckpointError where the checkpoint has no head, or one in a spelling that is not known.
    """
    weights = _head_weights(checkpoint)
    if not weights:
        raise CheckpointError(f"{checkpoint.inventory.source} has no multi-token-prediction head to draft with")
    if set(_QWEN.values()) <= set(weights):
        return dict(_QWEN), "mtp.layers.0."
    for name in sorted(weights):
        if name.endswith("." + _DEEPSEEK["join"]):
            prefix = name.removesuffix(_DEEPSEEK["join"])
            names = {key: prefix + part for key, part in _DEEPSEEK.items()}
            names |= {key: prefix + part for key, part in _OPTIONAL.items() if prefix + part in weights}
            if set(names.values()) <= set(weights):
                return names, prefix
    raise CheckpointError(
        f"{checkpoint.inventory.source} has a multi-token-prediction head in a spelling that is not known; those of "
        "Qwen3.5 (mtp.*) and DeepSeek-V3 (eh_proj) are"
    )


def _full_attention(config: Any) -> int:
    """The number of a layer built as the head's: with full attention, and experts where the model has any."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    return full[-1] if full else config.num_hidden_layers - 1


def _linear(weight: torch.Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
