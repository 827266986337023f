"""A checkpoint at a glance: family, dialect, and what each role holds, from headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from halfbyte.compatibility.engine_facts import CompatibilityNote, RoleHolding, compatibility_notes
from halfbyte.models.roles import is_under
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.unread import likely_method, unread_codes, unread_method, without_language_model

CLASSES = {
    "routed experts": ("experts", "experts_latent"),
    "shared experts": ("shared_expert",),
    "dense MLP": ("mlp",),
    "attention": ("attention", "indexer"),
    "linear attention": ("linear_attention", "mamba"),
    "embedding": ("embedding",),
    "lm_head": ("lm_head",),
    "router": ("router", "shared_expert_gate"),
    "MTP": ("mtp",),
    "vision": ("vision",),
    "norms and others": (),
}
"""What people ask for by one word, and the roles below it; the last one takes the rest."""


@dataclass
class RoleSummary:
    """All weights of one role: source tensors, elements, bytes, and how they are stored (name -> weights).

    ``per_expert``: the experts lie one per tensor.
    """

    role: str
    tensors: int = 0
    weights: int = 0
    parameters: int = 0
    nbytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    per_expert: bool = False


@dataclass
class ClassSummary:
    """The roles of one class together; bytes by how they are stored (a format or a dtype)."""

    name: str
    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0
    stored: dict[str, int] = field(default_factory=dict)

    def add(self, tensors: int, parameters: int, nbytes: int, stored: str) -> None:
        """Add a weight to the counts."""
        self.tensors += tensors
        self.parameters += parameters
        self.nbytes += nbytes
        self.stored[stored] = self.stored.get(stored, 0) + nbytes


@dataclass
class Overview:
    """What a checkpoint holds. ``dialect`` is None where nothing is quantized; bytes are those of the tensors.

    ``method``: of a quantization that no dialect reads; ``packed``: the first tensor of codes that no configuration
    covers, and what it is ``likely`` of; ``engines``: what each engine is known to lose, refuse or get wrong of it
    (``halfbyte.compatibility.engine_facts``).
    """

    source: str
    revision: str | None
    fingerprint: str
    family: str
    generic: bool
    note: str
    architectures: list[str]
    dialect: str | None
    tensors: int
    weights: int
    parameters: int
    data_bytes: int
    files: dict[str, int]
    roles: list[RoleSummary]
    classes: list[ClassSummary]
    engines: dict[str, list[CompatibilityNote]]
    vision: bool
    mtp: bool
    side_files: dict[str, int]
    side_file_bytes: int
    ignored_files: list[str]
    method: str = ""
    packed: str = ""
    likely: str = ""
    vision_only: bool = False

    @property
    def bits_per_weight(self) -> float:
        """8 x data bytes / parameters."""
        return 8 * self.data_bytes / max(self.parameters, 1)


def overview(checkpoint: Checkpoint) -> Overview:
    """Count a checkpoint's weights by role, in the order in which the roles first occur."""
    inventory = checkpoint.inventory
    roles: dict[str, RoleSummary] = {}
    classes = {name: ClassSummary(name) for name in CLASSES}
    for weight in checkpoint.weights:
        summary = roles.setdefault(weight.role, RoleSummary(weight.role))
        fmt = checkpoint.formats.get(weight.name)
        names = checkpoint.tensors_of(weight)
        summary.tensors += len(names)
        summary.weights += 1
        summary.parameters += math.prod(weight.shape)
        size = sum(inventory.tensors[name].nbytes for name in names)
        summary.nbytes += size
        summary.per_expert |= weight.pieces[0].expert is not None
        _class_of(weight.role, classes).add(
            len(names), math.prod(weight.shape), size, fmt.name if fmt else weight.dtype
        )
        _count(summary.formats if fmt else summary.dtypes, fmt.name if fmt else weight.dtype)
    names_of_roles = set(roles)
    return Overview(
        source=inventory.source,
        revision=inventory.revision,
        fingerprint=inventory.fingerprint,
        family=checkpoint.family.name,
        generic=checkpoint.family.is_generic,
        note=checkpoint.family.note,
        architectures=_strings(inventory.config.get("architectures")),
        dialect=checkpoint.dialect.name if checkpoint.dialect else None,
        tensors=len(inventory.tensors),
        weights=len(checkpoint.weights),
        parameters=sum(r.parameters for r in roles.values()),
        data_bytes=inventory.total_bytes,
        files=inventory.files,
        roles=list(roles.values()),
        classes=[summary for summary in classes.values() if summary.tensors],
        engines=compatibility_notes(
            checkpoint.family.name,
            checkpoint.dialect.name if checkpoint.dialect else None,
            [RoleHolding(r.role, frozenset(r.formats), r.tensors, r.nbytes, r.per_expert) for r in roles.values()],
        ),
        vision=any(r.startswith("vision") for r in names_of_roles),
        mtp=any(r.startswith("mtp") for r in names_of_roles),
        side_files=inventory.side_files,
        side_file_bytes=inventory.side_file_bytes,
        ignored_files=list(inventory.ignored_files),
        method=unread_method(checkpoint),
        packed=next((f"{w.name} ({w.dtype})" for w in unread_codes(checkpoint)), ""),
        likely=likely_method(checkpoint) if any(unread_codes(checkpoint)) else "",
        vision_only=without_language_model(checkpoint),
    )


def _class_of(role: str, classes: dict[str, ClassSummary]) -> ClassSummary:
    bare = role.removeprefix("quantized.")
    name = next((n for n, below in CLASSES.items() if any(is_under(bare, prefix) for prefix in below)), None)
    return classes[name or list(CLASSES)[-1]]


def _count(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def _strings(value: Any) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []
