"""How much a weight's relative output error matters, from its place in the model alone: no text, no forward pass.

The reasoning, with nothing fitted. Sublayers (attention or another mixer; MLP or experts) add their outputs to one
residual stream, after which the head reads it.

- The head's error reaches the logits as it is: factor 1. An error of the same relative size of the whole final stream
  changes the logits as much, so other factors are shares of the stream that carry a weight's error.
- With n sublayers and embeddings, all of like size and unlike direction, each is 1/(n + 1) of the final stream's
  energy. If an error only stayed where it is written, this would be its factor, at any depth.
- When sublayer k has written (embeddings: k = 0), its output is 1/(k + 1) of the stream. If all later sublayers passed
  the relative error of what they read on to what they write, this would be the factor.
- The truth lies between; the factor is the geometric mean, 1/sqrt((k + 1)(n + 1)).

Errors of a sublayer's weights add up, as for a product. Routed and shared experts are branches of one sublayer, taken
for equally loud, so their errors count half. But where a gate scales the shared expert by a sigmoid, about 1/2, it has
a quarter of the other's energy: a fifth of the sublayer. benchmarks/allocation_prior.py compares all this with
measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from halfbyte.models import Weight
from halfbyte.models.roles import bare_role, is_under

HEAD, STREAM = "lm_head", "embedding"
MIXERS = ("attention", "cross_attention", "linear_attention", "mamba", "indexer")
FEED_FORWARD = ("mlp", "per_layer", "experts", "experts_latent", "router", "shared_expert", "shared_expert_gate")
GATE = "shared_expert_gate"
SHARED = ("shared_expert", GATE)
ROUTED = ("experts", "experts_latent", "router")
PARTS = {
    "attention.qkv": 3,
    "cross_attention.qkv": 3,
    "linear_attention.qkvz": 2,
    "linear_attention.ba": 2,
    "mlp.gate_up": 2,
    "experts.gate_up": 2,
    "shared_expert.gate_up": 2,
}
"""Of how many weights a fused one consists; apart, each would have an error of its own."""


def structure_factors(weights: Sequence[Weight], tied: bool = False) -> dict[str, float]:
    """A factor for the relative error of each of a checkpoint's ``weights``, by name; the head's is 1.

    ``tied``: the embeddings are the head as well, so both effects add up. Weights without a known place in the
    residual stream (vision, unknown roles) get the factor of a sublayer in the middle; those that only draft tokens
    (MTP), that of the last one.
    """
    places = {w.name: _sublayer(w) for w in weights}
    order = {place: k for k, place in enumerate(sorted({p for p in places.values() if p}), 1)}
    n = len(order)
    shared = {(_drafts(w), w.layer) for w in weights if _any(bare_role(w.role), SHARED)}
    gated = {(_drafts(w), w.layer) for w in weights if bare_role(w.role) == GATE}

    def branch(weight: Weight) -> float:
        role, at = bare_role(weight.role), (_drafts(weight), weight.layer)
        if at not in shared or not _any(role, (*SHARED, *ROUTED)):
            return 1.0
        return 0.5 if at not in gated else 0.2 if _any(role, SHARED) else 0.8

    def reach(k: float) -> float:
        return 1 / math.sqrt((k + 1) * (n + 1))

    def factor(weight: Weight) -> float:
        role, place = bare_role(weight.role), places[weight.name]
        if role in (HEAD, STREAM) and not _drafts(weight):
            return 1 + reach(0) if tied else 1.0 if role == HEAD else reach(0)
        k = n if _drafts(weight) else order[place] if place else n / 2
        return reach(k) * branch(weight) * PARTS.get(role, 1)

    return {w.name: factor(w) for w in weights}


def _sublayer(weight: Weight) -> tuple[int, int] | None:
    """Layer, and 0 for its mixer or 1 for what follows; None for what is in no layer of the main model."""
    role = bare_role(weight.role)
    if weight.layer is None or _drafts(weight) or not _any(role, (*MIXERS, *FEED_FORWARD)):
        return None
    return weight.layer, int(_any(role, FEED_FORWARD))


def _drafts(weight: Weight) -> bool:
    return weight.role.removeprefix("quantized.").startswith("mtp.")


def _any(role: str, prefixes: Iterable[str]) -> bool:
    return any(is_under(role, prefix) for prefix in prefixes)
