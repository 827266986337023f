"""Which groups of weights a plan smooths, and what smoothing made of the weights of a finished output."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

from halfbyte.checkpoint import Reader
from halfbyte.errors import CheckpointError
from halfbyte.models.name_templates import normalise
from halfbyte.models.smoothing_groups import SmoothingGroup, find_groups
from halfbyte.models.tied import is_tied
from halfbyte.plan.shards import Item
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.smoothing import SMOOTHING_FILE, Smoothing, make_smoothings, read_scales

UNFED = "nothing before it can be divided"
UNKNOWN = "the importance file says nothing of it"
DROPPED = "what comes before it is dropped"


def groups_of(checkpoint: Checkpoint) -> list[SmoothingGroup]:
    """All groups of a checkpoint that could be smoothed, with refusals."""
    tied = is_tied(checkpoint.inventory.config)
    return find_groups(checkpoint.weights, checkpoint.family, checkpoint.formats, tied=tied)


def stored_smoothings(out: Path, source: Checkpoint, reader: Reader) -> dict[str, Smoothing]:
    """What smoothing made of each weight of an output, by name; {} where nothing was. ``reader`` reads the source.

    The groups are found anew, so that one that was cut short is noticed. CheckpointError where they do not fit.
    """
    if not (out / SMOOTHING_FILE).is_file():
        return {}
    groups = {group.name: group for group in groups_of(source) if group.refusal is None}
    scales = read_scales(out / SMOOTHING_FILE)
    for name in scales:
        if name not in groups:
            raise CheckpointError(f"{SMOOTHING_FILE} smooths {name}, which cannot be smoothed in this source")
    return make_smoothings(source, reader, [groups[name] for name in scales], scales)


def smoothed_groups(
    checkpoint: Checkpoint, items: Sequence[Item], wanted: set[str], known: Container[str]
) -> tuple[list[SmoothingGroup], dict[str, list[str]]]:
    """The groups that are smoothed, and reason -> names of the wanted weights that are not."""
    if not wanted:
        return [], {}
    groups: list[SmoothingGroup] = []
    refused: dict[str, tuple[str, list[str]]] = {}
    dropped = {i.weight.name for i in items if i.action == "drop"}
    fed: set[str] = set()
    for group in groups_of(checkpoint):
        asked = [w.name for w in group.consumers if w.name in wanted]
        fed.update(asked)
        problem = group.refusal
        if problem is None and any(p.weight.name in dropped for p in group.producers):
            problem = DROPPED
        if problem is None and not any(w.name in known for w in group.consumers):
            problem = UNKNOWN
        if asked and problem:
            refused.setdefault(normalise(problem), (problem, []))[1].extend(asked)
        elif asked:
            groups.append(group)
    unfed = [i.weight.name for i in items if i.weight.name in wanted - fed]
    return groups, dict(refused.values()) | ({UNFED: unfed} if unfed else {})
