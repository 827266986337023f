"""Adapters (LoRA and its kin) are no models, and are named as what they are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from halfbyte.checkpoint.files import check_link, parse_object, read_small
from halfbyte.checkpoint.foreign import Fields
from halfbyte.errors import CheckpointError

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model", "adapters.", "adapter.")


def check_no_adapter(root: Path, weights: Iterable[str], others: Iterable[str]) -> None:
    """CheckpointError where the weight files of a folder, or all there is in it, are those of an adapter."""
    weights = list(weights)
    alone = [name for name in others if name.startswith(_WEIGHTS)] if not weights else []
    if (weights or alone) and all(name.startswith(_WEIGHTS) for name in weights):
        raise _refusal(root, (weights or alone)[0])


def check_no_lora(root: Path, file: str, tensors: Iterable[str]) -> None:
    """CheckpointError where all tensors are low-rank factors."""
    names = list(tensors)
    if names and all(".lora_" in name.lower() for name in names):
        raise _refusal(root, file)


def _refusal(root: Path, file: str) -> CheckpointError:
    base, path = "", root / CONFIG
    if path.exists() or path.is_symlink():
        check_link(root, path)
        fields = Fields(parse_object(read_small(path), str(path), strict=False), str(path))
        base = fields.text("base_model_name_or_path")[:200]
    of = f" of {base}" if base else ""
    return CheckpointError(
        f"{root} holds an adapter{of} ({file}) and no model; merge it into its base model first, as peft's "
        "merge_and_unload does"
    )
