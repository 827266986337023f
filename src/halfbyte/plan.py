"""The plan: inventory x recipe x dialect, complete and exact before any weight is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from halfbyte.checkpoint import Layout, build_header, nbytes
from halfbyte.dialects import Dialect, OutputTensor, get_dialect
from halfbyte.errors import FormatError, PlanError
from halfbyte.formats import Format, get_format
from halfbyte.models import Weight
from halfbyte.recipes import Decision, Recipe, load_recipe, resolve
from halfbyte.search import get_search
from halfbyte.view import FLOATS, Checkpoint

MAX_SHARD_BYTES = 5_000_000_000
CONFIG, INDEX, PROVENANCE = "config.json", "model.safetensors.index.json", "halfbyte.json"
# part of the fingerprint: raise it when the same plan would give other bytes
PLAN_VERSION = 1


@dataclass(slots=True)
class Item:
    """One weight's fate: ``quantize``, ``keep`` or ``drop``, and the output tensors that hold it."""

    weight: Weight
    action: str
    reason: str
    format: Format | None = None
    search: str = ""
    power_of_two: bool = False
    outputs: list[OutputTensor] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Elements of the weight."""
        return math.prod(self.weight.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its output tensors."""
        return sum(nbytes(o.dtype, o.shape) for o in self.outputs)

    @property
    def splits(self) -> bool:
        """Whether one source tensor becomes tensors of several modules."""
        return (
            self.action == "quantize"
            and len(self.weight.pieces) == 1
            and any(o.expert is not None for o in self.outputs)
        )


@dataclass(slots=True)
class Shard:
    """An output file: its units (items that share a tensor scale stay together) and its layout."""

    name: str
    units: list[list[Item]]
    layout: Layout


@dataclass
class Plan:
    """Everything about the output that does not depend on the weights' values."""

    checkpoint: Checkpoint
    recipe: Recipe
    dialect: Dialect
    items: list[Item]
    shards: list[Shard]
    index: bytes | None
    config: bytes
    provenance: bytes
    extra_files: dict[str, bytes]
    notes: list[str]

    @property
    def data_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(item.nbytes for item in self.items)

    @property
    def shard_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(shard.layout.total for shard in self.shards)

    @property
    def repository_bytes(self) -> int:
        """Bytes of the whole output folder: weight files, index, configuration, side files."""
        written = [self.index or b"", self.config, self.provenance, *self.extra_files.values()]
        inventory = self.checkpoint.inventory
        replaced = sum(inventory.side_files[name] for name in inventory.side_files if name not in self.side_files)
        return self.shard_bytes + sum(map(len, written)) + inventory.side_file_bytes - replaced

    @property
    def side_files(self) -> list[str]:
        """Files that are copied unchanged."""
        return [n for n in self.checkpoint.inventory.side_files if n not in self.extra_files and n != PROVENANCE]

    @property
    def parameters(self) -> int:
        """Elements of all weights that the output holds."""
        return sum(item.parameters for item in self.items if item.action != "drop")

    @property
    def bits_per_weight(self) -> float:
        """8 x data bytes / parameters, over everything that the output holds."""
        return 8 * self.data_bytes / max(self.parameters, 1)

    @property
    def tensors(self) -> int:
        """Number of output tensors."""
        return sum(len(item.outputs) for item in self.items)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides the output's bytes."""
        parts = (
            PLAN_VERSION,
            self.checkpoint.inventory.fingerprint,
            self.recipe.model_dump(mode="json"),
            self.dialect.name,
        )
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        for shard in self.shards:
            digest.update(shard.name.encode() + shard.layout.header)
        for name, content in sorted(self.extra_files.items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()


def make_plan(
    checkpoint: Checkpoint,
    recipe: str | Recipe,
    dialect: str | Dialect | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: dict[str, bytes] | None = None,
) -> Plan:
    """Decide every tensor's fate and place. All refusals happen here: RecipeError, FormatError, PlanError."""
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    dialect = get_dialect(dialect or recipe.dialect or "halfbyte")
    weights = [_upright(w) for w in checkpoint.weights]
    decisions = resolve(recipe, weights)
    items = [_item(checkpoint, w, d, dialect) for w, d in zip(weights, decisions, strict=True)]
    for item in items:
        if item.action == "keep":
            item.outputs = _kept(checkpoint, item, dialect)
    _check_groups(items)
    quantized = [(i.weight, i.format) for i in items if i.format is not None]
    kept = [i.weight for i in items if i.action == "keep"]
    if not quantized:
        raise PlanError(f"recipe {recipe.name} quantizes nothing in {checkpoint.inventory.source}; check its rules")
    shards = _shards(items, max_shard_bytes)
    config = dict(checkpoint.inventory.config)
    config.pop("quantization_config", None)
    config["quantization_config"] = dialect.config(quantized, kept)
    inventory = checkpoint.inventory
    provenance = {
        "halfbyte": PLAN_VERSION,
        "source": {
            "name": inventory.source.rstrip("/").rsplit("/", 1)[-1],
            "revision": inventory.revision,
            "fingerprint": inventory.fingerprint,
        },
        "dialect": dialect.name,
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
    }
    notes = [checkpoint.family.note] if checkpoint.family.note else []
    if inventory.ignored_files:
        notes.append(f"not part of the checkpoint, not copied: {', '.join(inventory.ignored_files[:5])}")
    return Plan(
        checkpoint,
        recipe,
        dialect,
        items,
        shards,
        _index(shards),
        _json(config),
        _json(provenance),
        extra_files or {},
        notes,
    )


def _upright(weight: Weight) -> Weight:
    """Experts stored as [E, K, N] are quantized along K, so they are planned as [E, N, K]."""
    if not weight.transposed:
        return weight
    return replace(weight, shape=(*weight.shape[:-2], weight.shape[-1], weight.shape[-2]))


def _item(checkpoint: Checkpoint, weight: Weight, decision: Decision, dialect: Dialect) -> Item:
    if decision.action != "quantize":
        return Item(weight, decision.action, decision.reason)
    assert decision.format is not None and decision.search is not None
    fmt = get_format(decision.format)
    get_search(decision.search, fmt)
    if weight.dtype not in FLOATS or len(weight.shape) < 2:
        raise PlanError(
            f"rule {decision.rule} of the recipe wants to quantize {weight.name} "
            f"({weight.dtype} {list(weight.shape)}), which is no floating-point matrix; "
            "narrow the rule or keep this tensor"
        )
    problem = fmt.problem(weight.shape)
    if problem:
        if decision.indivisible == "keep":
            return Item(weight, "keep", problem)
        raise FormatError(f"{weight.name}: {problem}; say `indivisible: keep` in the rule or choose another format")
    problem = dialect.problem(weight, fmt)
    if problem:
        raise PlanError(f"{weight.name}: {problem}")
    power = decision.tensor_scale == "power_of_two"
    return Item(weight, "quantize", decision.reason, fmt, decision.search, power, dialect.outputs(weight, fmt))


def _kept(checkpoint: Checkpoint, item: Item, dialect: Dialect) -> list[OutputTensor]:
    """A kept weight's tensors as the source has them."""
    if item.weight.name in checkpoint.formats:
        if checkpoint.dialect is not dialect:
            raise PlanError(
                f"{item.weight.name} is quantized in the source and kept by the recipe, but the dialect changes; "
                "give it a rule with a format, or write the source's dialect"
            )
        names = [o.name for o in checkpoint.stored(item.weight)]
    else:
        names = list(item.weight.sources)
    infos = (checkpoint.inventory.tensors[name] for name in names)
    return [OutputTensor(t.name, t.dtype, t.shape, "copy") for t in infos]


def _check_groups(items: Iterable[Item]) -> None:
    """An indivisible member keeps its whole fusion group from being split between formats."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        if item.weight.group:
            groups.setdefault(item.weight.group, []).append(item)
    for name, members in groups.items():
        if len({(m.action, m.format) for m in members}) > 1:
            told = ", ".join(f"{m.weight.name}: {m.format.name if m.format else m.action}" for m in members)
            raise PlanError(f"engines fuse the group {name}, so its members need one format, but they have {told}")


def _shards(items: list[Item], limit: int) -> list[Shard]:
    units: dict[str, list[Item]] = {}
    for item in items:
        if item.outputs:
            units.setdefault(item.weight.group or f"={item.weight.name}", []).append(item)
    files: list[list[list[Item]]] = [[]]
    size = 0
    for unit in units.values():
        unit_bytes = sum(item.nbytes for item in unit)
        if files[-1] and size + unit_bytes > limit:
            files.append([])
            size = 0
        files[-1].append(unit)
        size += unit_bytes
    shards = []
    for i, members in enumerate(files):
        name = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        layout = build_header([(o.name, o.dtype, o.shape) for unit in members for item in unit for o in item.outputs])
        offsets = iter(layout.offsets)
        for unit in members:
            for item in unit:
                item.offsets = [next(offsets) for _ in item.outputs]
        shards.append(Shard(name, members, layout))
    return shards


def _index(shards: list[Shard]) -> bytes | None:
    if len(shards) == 1:
        return None
    names = {o.name: shard.name for shard in shards for unit in shard.units for item in unit for o in item.outputs}
    total = sum(item.nbytes for shard in shards for unit in shard.units for item in unit)
    return _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
