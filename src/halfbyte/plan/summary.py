"""A plan in numbers and words: what becomes of every class of weights, and of every tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from halfbyte.plan.shards import Item

if TYPE_CHECKING:
    from halfbyte.plan.conversion_plan import Plan


def summarize(plan: Plan) -> dict[str, Any]:
    """Exact sizes and one entry per class (role, action, format, reason) of weights; JSON can hold it.

    ``tensors`` counts source tensors in classes and output tensors in total; bytes are those of the output.
    """
    classes: dict[tuple[str, str, str | None, str], list[Item]] = {}
    for item in plan.items:
        name = _format(plan, item)
        classes.setdefault((item.weight.role, item.action, name, item.reason), []).append(item)
    return {
        "data_bytes": plan.data_bytes,
        "header_bytes": plan.shard_bytes - plan.data_bytes,
        "index_bytes": len(plan.index or b""),
        "side_file_bytes": plan.side_file_bytes,
        "repository_bytes": plan.repository_bytes,
        "tensors": plan.tensors,
        "parameters": plan.parameters,
        "bits_per_weight": plan.bits_per_weight,
        "classes": [
            {
                "role": role,
                "action": action,
                "format": name,
                "tensors": sum(len(_sources(plan, item)) for item in items),
                "output_tensors": sum(len(item.outputs) for item in items),
                "parameters": (parameters := sum(item.parameters for item in items)),
                "bits_per_weight": 8 * (size := sum(item.nbytes for item in items)) / max(parameters, 1),
                "bytes": size,
                "reason": reason,
            }
            for (role, action, name, reason), items in classes.items()
        ],
        "kept": _fates(plan, (item for item in plan.items if item.action == "keep")),
        "split": _fates(plan, (item for item in plan.items if item.splits)),
        "dropped": _fates(plan, (item for item in plan.items if item.action == "drop")),
        "contains": {space: any(_space(i) == space and i.outputs for i in plan.items) for space in SPACES},
        "fold_bytes": plan.smoothing_bytes,
        "importance": plan.calibration_use.to_dict() if plan.calibration_use else None,
        "notes": plan.notes,
    }


SPACES = ("text", "vision", "mtp")


def to_dict(plan: Plan) -> dict[str, Any]:
    """The whole plan: the summary, the fate of every source tensor, the place of every output tensor."""
    return {
        "source": plan.checkpoint.inventory.source,
        "recipe": plan.recipe.name,
        "dialect": plan.dialect.name,
        "fingerprint": plan.fingerprint,
        **summarize(plan),
        "sources": [
            {
                "name": name,
                "weight": item.weight.name,
                "role": item.weight.role,
                "action": "split" if item.splits else item.action,
                "format": _format(plan, item),
                "reason": item.reason,
            }
            for item in plan.items
            for name in _sources(plan, item)
        ],
        "outputs": [
            {
                "name": output.name,
                "dtype": output.dtype,
                "shape": list(output.shape),
                "shard": shard.name,
                "offset": offset,
                "weight": item.weight.name,
            }
            for shard in plan.shards
            for item in shard.items
            for output, offset in zip(item.outputs, item.offsets, strict=True)
        ],
    }


def _format(plan: Plan, item: Item) -> str | None:
    """What a weight is stored in: a format's name, or the dtype of a kept tensor."""
    fmt = item.format or plan.checkpoint.formats.get(item.weight.name)
    if item.action == "drop":
        return None
    if fmt:
        return fmt.name
    return item.outputs[0].dtype if item.action == "keep" and item.outputs else item.weight.dtype


def _sources(plan: Plan, item: Item) -> Sequence[str]:
    """Names of the source's tensors that hold a weight, those of its scales included."""
    if item.weight.name in plan.checkpoint.formats:
        return [output.name for output in plan.checkpoint.stored(item.weight)]
    return item.weight.sources


def _fates(plan: Plan, items: Iterable[Item]) -> list[dict[str, Any]]:
    """Tensors by role and reason, with the first one's name."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for item in items:
        entry = found.setdefault(
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
        entry["tensors"] += len(_sources(plan, item))
        entry["output_tensors"] += len(item.outputs)
    return list(found.values())


def _space(item: Item) -> str:
    first = item.weight.role.removeprefix("quantized.").split(".")[0]
    return first if first in SPACES else "text"
