"""Items in numbers and words: what becomes of every class of weights, and of every tensor. JSON can hold it all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from halfbyte.plan.shards import Item, Shard
from halfbyte.source.checkpoint import Checkpoint

SPACES = ("text", "vision", "mtp")


def summarize_classes(checkpoint: Checkpoint, items: Iterable[Item]) -> list[dict[str, Any]]:
    """One entry per class (role, action, format, reason) of weights.

    ``tensors`` counts tensors of the source, ``bytes`` are those of the output.
    """
    classes: dict[tuple[str, str, str | None, str], list[Item]] = {}
    for item in items:
        name = stored_in(checkpoint, item)
        classes.setdefault((item.weight.role, item.action, name, item.reason), []).append(item)
    return [
        {
            "role": role,
            "action": action,
            "format": name,
            "tensors": sum(len(source_names(checkpoint, item)) for item in members),
            "output_tensors": sum(len(item.outputs) for item in members),
            "parameters": (parameters := sum(item.parameters for item in members)),
            "bits_per_weight": 8 * (size := sum(item.nbytes for item in members)) / max(parameters, 1),
            "bytes": size,
            "reason": reason,
        }
        for (role, action, name, reason), members in classes.items()
    ]


def summarize_fates(checkpoint: Checkpoint, items: Sequence[Item]) -> dict[str, Any]:
    """What is kept, split and dropped, and which spaces (text, vision, MTP) the output holds."""
    return {
        "kept": _by_reason(checkpoint, (item for item in items if item.action == "keep")),
        "split": _by_reason(checkpoint, (item for item in items if item.splits)),
        "dropped": _by_reason(checkpoint, (item for item in items if item.action == "drop")),
        "contains": {space: any(_space(i) == space and i.outputs for i in items) for space in SPACES},
    }


def list_sources(checkpoint: Checkpoint, items: Iterable[Item]) -> list[dict[str, Any]]:
    """The fate of every tensor of the source."""
    return [
        {
            "name": name,
            "weight": item.weight.name,
            "role": item.weight.role,
            "action": "split" if item.splits else item.action,
            "format": stored_in(checkpoint, item),
            "reason": item.reason,
        }
        for item in items
        for name in source_names(checkpoint, item)
    ]


def list_outputs(shards: Iterable[Shard]) -> list[dict[str, Any]]:
    """The place of every tensor of the output."""
    return [
        {
            "name": output.name,
            "dtype": output.dtype,
            "shape": list(output.shape),
            "shard": shard.name,
            "offset": offset,
            "weight": item.weight.name,
        }
        for shard in shards
        for item in shard.items
        for output, offset in zip(item.outputs, item.offsets, strict=True)
    ]


def stored_in(checkpoint: Checkpoint, item: Item) -> str | None:
    """What a weight is stored in: a format's name, or the dtype of a kept tensor; None where it is dropped."""
    fmt = item.format or checkpoint.formats.get(item.weight.name)
    if item.action == "drop":
        return None
    if fmt:
        return fmt.name
    return item.outputs[0].dtype if item.action == "keep" and item.outputs else item.weight.dtype


def source_names(checkpoint: Checkpoint, item: Item) -> Sequence[str]:
    """Names of the source's tensors that hold a weight, those of its scales included."""
    if item.weight.name in checkpoint.formats:
        return [output.name for output in checkpoint.stored(item.weight)]
    return item.weight.sources


def _by_reason(checkpoint: Checkpoint, items: Iterable[Item]) -> list[dict[str, Any]]:
    """Count tensors by role and reason, with the first one's name."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for item in items:
        entry = entries.setdefault(
            (item.weight.role, item.reason),
            {
                "role": item.weight.role,
                "reason": item.reason,
                "declined": item.declined or None,
                "tensors": 0,
                "output_tensors": 0,
                "example": item.weight.sources[0],
            },
        )
        entry["tensors"] += len(source_names(checkpoint, item))
        entry["output_tensors"] += len(item.outputs)
    return list(entries.values())


def _space(item: Item) -> str:
    first = item.weight.role.removeprefix("quantized.").split(".")[0]
    return first if first in SPACES else "text"
