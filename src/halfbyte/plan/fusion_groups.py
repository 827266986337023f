"""Weights of a plan that engines hold together: fusion groups and tied embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from halfbyte.models.tied import is_tied
from halfbyte.plan.refusal import Refusal
from halfbyte.plan.shards import Item
from halfbyte.plan.transcoding import REQUANTIZED


def check_groups(items: Iterable[Item]) -> Refusal | None:
    """Refuse fusion groups whose members have more than one format."""
    for name, members in _groups(items).items():
        if len({m.format or m.action for m in members}) > 1:
            return Refusal(
                f"engines fuse the group {name}, so its members need one format, but they have {_fates(members)}"
            )
    return None


def requantized_together(items: Sequence[Item]) -> tuple[Item, ...]:
    """The items, where groups that share a scale and are quantized only in part yet are requantized as a whole."""
    groups = {
        name
        for name, members in _groups(items).items()
        if (fmt := members[0].format) and fmt.shares_scale and any(m.action == "quantize" for m in members)
    }
    return tuple(
        replace(i, action="quantize", reason=REQUANTIZED) if i.weight.group in groups and i.action != "quantize" else i
        for i in items
    )


def check_tied(config: Mapping[str, Any], items: Iterable[Item]) -> Refusal | None:
    """Refuse tied embeddings in two formats: they are one tensor for an engine, also where they are stored twice."""
    if not is_tied(config):
        return None
    ends = [item for item in items if item.weight.role in ("embedding", "lm_head") and item.action != "drop"]
    if len({item.format for item in ends}) <= 1:
        return None
    return Refusal(
        f"the embeddings are tied (tie_word_embeddings), so they need one format, but they have {_fates(ends)}"
    )


def _groups(items: Iterable[Item]) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = {}
    for item in items:
        if item.weight.group:
            groups.setdefault(item.weight.group, []).append(item)
    return groups


def _fates(items: Iterable[Item]) -> str:
    return ", ".join(f"{i.weight.name}: {i.format.name if i.format else i.action}" for i in items)
