"""Which modules of a model keep keys and values in a cache."""

from __future__ import annotations

from halfbyte.models.weight import Weight

_KEYS = ("attention.k", "attention.qkv")


def attention_of(weight: Weight) -> str | None:
    """The attention module whose keys a weight makes, MTP layers' included; None for every other weight.

    Latent attention (MLA) has none: what it caches are no keys and values.
    """
    if weight.role.removeprefix("mtp.") not in _KEYS:
        return None
    return weight.name.removesuffix(".weight").rpartition(".")[0]
