"""Weights of a plan that engines hold together: fusion groups and tied embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from halfbyte.errors import PlanError
from halfbyte.plan.calibration_use import is_tied
from halfbyte.plan.shards import Item
from halfbyte.plan.transcoding import REQUANTIZED


def check_groups(items: Iterable[Item]) -> None:
    """Members of a fusion group stay together: in one format, and requantized where only some are quantized yet."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        if item.weight.group:
            groups.setdefault(item.weight.group, []).append(item)
    for name, members in groups.items():
        if len({m.format or m.action for m in members}) > 1:
            raise PlanError(
                f"engines fuse the group {name}, so its members need one format, but they have {_fates(members)}"
            )
        if (fmt := members[0].format) and fmt.shares_scale and any(m.action == "quantize" for m in members):
            for m in members:
                m.action, m.reason = "quantize", m.reason if m.action == "quantize" else REQUANTIZED


def check_tied(config: Mapping[str, Any], items: Iterable[Item]) -> None:
    """Tied embeddings are one tensor for an engine, also where a checkpoint stores them twice."""
    if not is_tied(config):
        return
    ends = [item for item in items if item.weight.role in ("embedding", "lm_head") and item.action != "drop"]
    if len({item.format for item in ends}) > 1:
        raise PlanError(
            f"the embeddings are tied (tie_word_embeddings), so they need one format, but they have {_fates(ends)}"
        )


def _fates(items: Iterable[Item]) -> str:
    return ", ".join(f"{i.weight.name}: {i.format.name if i.format else i.action}" for i in items)
