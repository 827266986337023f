"""Adapters (LoRA and its kin) are no models, and are named as what they are."""

from __future__ import annotations

from collections.abc import Iterable

from halfbyte.checkpoint.files import parse_object
from halfbyte.checkpoint.foreign import Fields
from halfbyte.checkpoint.store import Store
from halfbyte.errors import CheckpointError

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model", "adapters.", "adapter.")


def check_no_adapter(store: Store, weights: Iterable[str], others: Iterable[str]) -> None:
    """CheckpointError where the weight files of a folder, or all there is in it, are those of an adapter."""
    weights = list(weights)
    alone = [name for name in others if name.startswith(_WEIGHTS)] if not weights else []
    if (weights or alone) and all(name.startswith(_WEIGHTS) for name in weights):
        raise _refusal(store, (weights or alone)[0])


def check_no_lora(store: Store, file: str, tensors: Iterable[str]) -> None:
    """CheckpointError where all tensors are low-rank factors."""
    names = list(tensors)
    if names and all(".lora_" in name.lower() for name in names):
        raise _refusal(store, file)


def _refusal(store: Store, file: str) -> CheckpointError:
    base, where = "", f"{store.place}/{CONFIG}"
    if store.exists(CONFIG):
        store.check(CONFIG)
        fields = Fields(parse_object(store.read_small(CONFIG), where, strict=False), where)
        base = fields.text("base_model_name_or_path")[:200]
    of = f" of {base}" if base else ""
    return CheckpointError(
        f"{store.place} holds an adapter{of} ({file}) and no model; merge it into its base model first, as peft's "
        "merge_and_unload does"
    )
