"""The plan: inventory x recipe x dialect, complete and exact before any weight is read."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from halfbyte.activations import calibrated as calibrated_scales
from halfbyte.activations import choose as choose_activations
from halfbyte.activations import settled as settled_activations
from halfbyte.calibrate import Calibration
from halfbyte.checkpoint.files import collector_paused
from halfbyte.dialects import Dialect, OutputTensor, get_dialect, quantization_config_of, unquantized_config
from halfbyte.errors import FormatError, PlanError
from halfbyte.fitting import check_fitted, fitted_note
from halfbyte.folding import FOLDS, layout
from halfbyte.formats import get_format
from halfbyte.groups import check_groups, check_tied
from halfbyte.kv_cache import settle_caches
from halfbyte.models import Weight
from halfbyte.models.folds import FoldGroup
from halfbyte.quantized import claim, misfit, obstacle, respelled, settle_input_scales
from halfbyte.recipes import Decision, Recipe, load_recipe, resolve
from halfbyte.search import get_search
from halfbyte.shards import Item, Shard, make_index, make_shards
from halfbyte.slices import Limits, Resources, find_resources
from halfbyte.summary import summarize, to_dict
from halfbyte.view import FLOATS, Checkpoint
from halfbyte.weighting import Weighting, optional_note, settle

MAX_SHARD_BYTES = 5_000_000_000
CONFIG, INDEX, PROVENANCE = "config.json", "model.safetensors.index.json", "halfbyte.json"
# part of the fingerprint: raise it when the same plan would give other bytes
PLAN_VERSION = 2


@dataclass
class Plan:
    """Everything about the output that does not depend on the weights' values."""

    checkpoint: Checkpoint
    recipe: Recipe
    dialect: Dialect
    items: list[Item]
    shards: list[Shard]
    index: bytes | None
    config: bytes | None
    provenance: bytes
    extra_files: dict[str, bytes]
    notes: list[str]
    weighting: Weighting | None = None

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
        written = [self.index or b"", self.config or b"", self.provenance, *self.extra_files.values()]
        return self.shard_bytes + self.fold_bytes + sum(map(len, written)) + self.side_file_bytes

    @property
    def folds(self) -> list[FoldGroup]:
        """Groups of weights whose scales for folding the conversion chooses."""
        return self.weighting.folds if self.weighting else []

    @property
    def fold_bytes(self) -> int:
        """Bytes of the file that holds these scales."""
        return layout(self.folds).total if self.folds else 0

    @property
    def side_file_bytes(self) -> int:
        """Bytes of the files that are copied unchanged."""
        if self.dialect.standalone:
            return 0
        inventory = self.checkpoint.inventory
        replaced = set(inventory.side_files) - set(self.side_files)
        return inventory.side_file_bytes - sum(inventory.side_files[name] for name in replaced)

    @property
    def side_files(self) -> list[str]:
        """Files that are copied unchanged."""
        if self.dialect.standalone:
            return []
        source = self.checkpoint.dialect
        replaced = {PROVENANCE, FOLDS, *self.extra_files, *(source.files if source else ())}
        return [name for name in self.checkpoint.inventory.side_files if name not in replaced]

    @property
    def config_files(self) -> list[str]:
        """Files of this plan's own beside the weights, without further ones of dialects."""
        return [PROVENANCE] if self.config is None else [CONFIG, PROVENANCE]

    @property
    def parameters(self) -> int:
        """Elements of all weights that the output holds."""
        return sum(item.parameters for item in self.items if item.action not in ("drop", "calibrate"))

    @property
    def bits_per_weight(self) -> float:
        """8 x data bytes / parameters, over everything that the output holds."""
        return 8 * self.data_bytes / max(self.parameters, 1)

    @property
    def tensors(self) -> int:
        """Number of output tensors."""
        return sum(len(item.outputs) for item in self.items)

    def resources(self, limits: Limits | None = None) -> Resources:
        """Threads and memory of a conversion within these limits, the process with this plan included."""
        units = (unit for shard in self.shards for unit in shard.units)
        tensors = len(self.checkpoint.inventory.tensors) + self.tensors
        folded = {w.name for g in self.folds for w in (*g.consumers, *(p.weight for p in g.producers))}
        return find_resources(units, self.checkpoint.formats, tensors, limits or Limits(), folded)

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
        digest.update(self.config or b"")
        if self.weighting:
            names = [i.weight.name for i in self.items if i.weighted], [group.name for group in self.folds]
            digest.update(json.dumps([self.weighting.calibration.digest, names]).encode())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Sizes and classes of weights; see ``halfbyte.summary.summarize``."""
        return summarize(self)

    def to_dict(self) -> dict[str, Any]:
        """The summary, every source tensor's fate and every output tensor's place."""
        return to_dict(self)


@collector_paused()
def make_plan(
    checkpoint: Checkpoint,
    recipe: str | Recipe,
    dialect: str | Dialect | None = None,
    max_shard_bytes: int | None = None,
    extra_files: dict[str, bytes] | None = None,
    extra_config: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """Decide every tensor's fate and place. All refusals happen here: RecipeError, FormatError, PlanError.

    ``max_shard_bytes`` is by default 5 GB, and without limit where weight files are complete in themselves.
    ``extra_files`` are written beside the weights, ``extra_config`` are further keys of config.json;
    ``calibration`` is an importance file that was matched to this checkpoint.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    dialect = get_dialect(dialect or recipe.dialect or "halfbyte")
    inventory = checkpoint.inventory
    method = quantization_config_of(inventory).get("quant_method")
    if checkpoint.dialect is None and method:
        raise PlanError(
            f"{inventory.source} is quantized by {method!r}, which cannot be read; start from another source"
        )
    if checkpoint.dialect and checkpoint.dialect.standalone:
        raise PlanError(
            f"{inventory.source} is in the dialect {checkpoint.dialect.name}, which inspect and verify read, but its "
            "configuration and tokenizer cannot be written in another form; start from the original checkpoint"
        )
    source = checkpoint.dialect
    dialect = source if source and source.name == dialect.name else dialect.for_model(inventory)
    if max_shard_bytes is None:
        max_shard_bytes = sys.maxsize if dialect.standalone else MAX_SHARD_BYTES
    weights = [w.upright() for w in checkpoint.weights]
    decisions = resolve(recipe, weights)
    items = [_item(checkpoint, w, d, dialect) for w, d in zip(weights, decisions, strict=True)]
    if not any(item.format for item in items):
        raise PlanError(f"recipe {recipe.name} quantizes nothing in {inventory.source}; check its rules")
    check_groups(items)
    notes = [checkpoint.family.note] if checkpoint.family.note else []
    choose_activations(items, decisions, dialect)
    notes += settle_input_scales(checkpoint, items, dialect)
    more = calibrated_scales(items, dialect, calibration)
    caches = settle_caches(checkpoint, recipe, items, dialect, calibration)
    notes += caches.notes
    more += caches.items
    activations = settled_activations(checkpoint, [*items, *more], dialect)
    check_tied(inventory.config, items)
    weighting = settle(checkpoint, recipe, items, decisions, calibration, scales=bool(more))
    notes += weighting.notes() if weighting else optional_note(recipe, decisions)
    notes += fitted_note(items)
    items += more
    spelled = [(i.weight, i.format, i.outputs) for i in items if i.outputs]
    shards = make_shards(items, max_shard_bytes, dialect.container(inventory, recipe.name, spelled))
    # what is kept may be quantized already, and the configuration has to say so
    formats = {i.weight.name: i.format or checkpoint.formats.get(i.weight.name) for i in items if i.action != "drop"}
    quantized = [(i.weight, fmt) for i in items if (fmt := formats.get(i.weight.name))]
    kept = [i.weight for i in items if i.action != "drop" and not formats[i.weight.name]]
    config = unquantized_config(source.original_config(inventory.config) if source else inventory.config)
    config |= dict(extra_config or {})
    config["quantization_config"] = settings = dialect.with_activations(activations).config(quantized, kept)
    settings |= caches.settings
    provenance = {
        "halfbyte": PLAN_VERSION,
        "source": {
            "name": inventory.source.rstrip("/").rsplit("/", 1)[-1],
            "revision": inventory.revision,
            "fingerprint": inventory.fingerprint,
        },
        "dialect": dialect.name,
        "recipe": _recipe(recipe),
    }
    if weighting:
        provenance["importance"] = {"name": weighting.calibration.name, "digest": weighting.calibration.digest}
        provenance["folds"] = FOLDS if weighting.folds else None
    if inventory.ignored_files:
        notes.append(f"not part of the checkpoint, not copied: {', '.join(inventory.ignored_files[:5])}")
    large = [shard.name for shard in shards if shard.layout.total > max_shard_bytes]
    if large:
        notes.append(f"larger than {max_shard_bytes} bytes, as what it holds cannot be divided: {', '.join(large[:5])}")
    return Plan(
        checkpoint,
        recipe,
        dialect,
        items,
        shards,
        None if dialect.standalone else make_index(shards),
        None if dialect.standalone else _json(dialect.complete(config)),
        _json(provenance),
        dialect.extra_files(settings) | (extra_files or {}),
        notes + dialect.notes(quantized) + dialect.notes_on_kept(kept),
        weighting,
    )


def _recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe that can be parsed again, with the defaults of this release spelled out."""
    told = recipe.model_dump(mode="json", exclude_none=True)
    for rule in told["rules"]:
        if "format" not in rule:
            for key in ("search", "tensor_scale", "indivisible"):
                del rule[key]
    return told


def _item(checkpoint: Checkpoint, weight: Weight, decision: Decision, dialect: Dialect) -> Item:
    if decision.action == "drop":
        return Item(weight, "drop", decision.reason)
    if decision.action == "keep":
        return _kept(checkpoint, weight, decision.reason, dialect)
    assert decision.format is not None and decision.search is not None
    fmt = dialect.format_for(weight, get_format(decision.format))
    get_search(decision.search, fmt)
    check_fitted(weight, decision, dialect)
    problem = misfit(weight, fmt, dialect)
    if weight.dtype not in FLOATS or (len(weight.shape) < 2 and decision.indivisible == "error"):
        raise PlanError(
            f"rule {decision.rule} of the recipe wants to quantize {weight.name} "
            f"({weight.dtype} {list(weight.shape)}), which is no floating-point matrix; "
            "narrow the rule or keep this tensor"
        )
    if problem and decision.indivisible == "keep":
        kept = _kept(checkpoint, weight, problem, dialect)
        kept.declined = fmt.name
        return kept
    if problem:
        raise FormatError(f"{weight.name}: {problem}; say `indivisible: keep` in the rule or choose another format")
    problem = dialect.problem(weight, fmt)
    if problem:
        raise PlanError(f"{weight.name}: {problem}")
    power = decision.tensor_scale == "power_of_two" or dialect.power_of_two
    before = checkpoint.formats.get(weight.name)
    if before:
        checkpoint.stored(weight)  # a missing part is found now and not in the middle of the conversion
    said = claim(weight, before, fmt, checkpoint.dialect, dialect) if before and checkpoint.dialect else None
    outputs = respelled(checkpoint, weight, fmt, dialect) if said else dialect.outputs(weight, fmt)
    action, reason = ("transcode", said) if said else ("quantize", decision.reason)
    fitted = decision.tensor_scale == "soar"
    return Item(weight, action, reason, fmt, decision.search, power, outputs, fitted=fitted)


def _kept(checkpoint: Checkpoint, weight: Weight, reason: str, dialect: Dialect) -> Item:
    """A kept weight's tensors as the source has them; in another dialect a quantized one keeps its codes."""
    tensors = checkpoint.inventory.tensors
    before, source = checkpoint.formats.get(weight.name), checkpoint.dialect
    if before is None or source is None:
        left_out = dialect.left_out(weight)
        if left_out:
            return Item(weight, "drop", left_out)
        if source is dialect:
            found = [tensors[name] for name in checkpoint.tensors_of(weight)]
            outputs = [OutputTensor(t.name, t.dtype, t.shape, "copy") for t in found]
            return Item(weight, "keep", reason, outputs=outputs)
        if checkpoint.tensors_of(weight) != list(weight.sources):
            return Item(weight, "keep", reason, outputs=dialect.kept(weight, [_original(weight)]))
        copied = [(tensors[piece.source], piece.expert) for piece in weight.pieces]
    elif source is dialect:
        copied = [(tensors[o.name], o.expert) for o in checkpoint.stored(weight)]
    else:
        problem = obstacle(weight, before, dialect)
        if problem:
            raise PlanError(
                f"{weight.name} is {before.name} in the source and kept by the recipe, but {problem}, "
                "or give it a rule with a format"
            )
        said = claim(weight, before, before, source, dialect) or ""
        return Item(weight, "transcode", said, before, "absmax", False, respelled(checkpoint, weight, before, dialect))
    outputs = [OutputTensor(t.name, t.dtype, t.shape, "copy", expert) for t, expert in copied]
    if before is None:
        outputs = dialect.kept(weight, outputs)
    return Item(weight, "keep", reason, outputs=outputs)


def _original(weight: Weight) -> OutputTensor:
    """A weight that the source spells in its own way, as a plain checkpoint has it."""
    lying = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2]) if weight.transposed else weight.shape
    return OutputTensor(weight.sources[0], weight.dtype, lying, "turned" if weight.transposed else "values")


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
