"""Building a plan: every tensor's fate and place, decided from headers, a recipe and a dialect."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from halfbyte.calibration import Calibration
from halfbyte.checkpoint.files import collector_paused
from halfbyte.dialects import Dialect
from halfbyte.dialects.modelopt_config import FILE as MODELOPT_FILE
from halfbyte.errors import PlanError
from halfbyte.formats import Format
from halfbyte.models import Weight
from halfbyte.plan.activation_scales import activation_settings, calibrated_scales, with_wishes
from halfbyte.plan.assignment import assign
from halfbyte.plan.calibrated_items import check_calibration, optional_note, use_calibration
from halfbyte.plan.calibration_use import CalibrationUse
from halfbyte.plan.configuration import make_config, make_provenance, make_settings
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.dialect_choice import find_dialect
from halfbyte.plan.fusion_groups import check_groups, check_tied, requantized_together
from halfbyte.plan.global_scales import fitted_note
from halfbyte.plan.kv_cache import add_cache_scales, respell_caches
from halfbyte.plan.output_names import check_names
from halfbyte.plan.refusal import enforce
from halfbyte.plan.shards import Item, Shard, make_index, make_shards
from halfbyte.plan.source_check import check_readable, check_source
from halfbyte.plan.target import check_rounded, without_calibration
from halfbyte.plan.transcoding import respell_input_scales
from halfbyte.plan.unrecognised import notes_on_reach
from halfbyte.recipes import Decision, Recipe, load_recipe, resolve
from halfbyte.source.checkpoint import Checkpoint

MAX_SHARD_BYTES = 5_000_000_000
_SHOWN = 12


@dataclass(frozen=True)
class Draft:
    """What is decided so far. Each step of ``make_plan`` takes one and gives another one.

    ``items`` belong to the weights of the source, in order, and ``decisions`` to them; ``scales`` are items for
    calibrated scales that the source lacks. ``activations`` and ``caches`` are what the configuration will say.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    dialect: Dialect
    calibration: Calibration | None
    notes: tuple[str, ...]
    decisions: tuple[Decision, ...] = ()
    items: tuple[Item, ...] = ()
    scales: tuple[Item, ...] = ()
    activations: Mapping[str, Any] = field(default_factory=dict)
    caches: Mapping[str, Any] = field(default_factory=dict)
    use: CalibrationUse | None = None

    @property
    def all_items(self) -> tuple[Item, ...]:
        """The items of the source's weights and those of new scales."""
        return self.items + self.scales

    def stored_formats(self) -> dict[str, Format | None]:
        """The format of every weight of the output by name: a kept one may be quantized already."""
        stored = self.checkpoint.formats
        return {i.weight.name: i.format or stored.get(i.weight.name) for i in self.all_items if i.action != "drop"}


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
    draft = _begin(checkpoint, recipe, dialect, calibration)
    draft = _assign_formats(draft)
    draft = _choose_activations(draft)
    draft = _add_activation_scales(draft)
    draft = _add_cache_scales(draft)
    draft = _describe_activations(draft)
    draft = _use_calibration(draft)
    if max_shard_bytes is None:
        max_shard_bytes = sys.maxsize if draft.dialect.package.standalone else MAX_SHARD_BYTES
    shards = _place(draft, max_shard_bytes)
    return _finish(draft, shards, max_shard_bytes, extra_files or {}, extra_config)


def plan_to_round(checkpoint: Checkpoint, recipe: Recipe, dialect: str | Dialect | None = None) -> Plan:
    """Make the plan of a recipe whose calibration rounds weights, before that calibration: formats and places."""
    return make_plan(checkpoint, without_calibration(recipe), dialect)


def _begin(
    checkpoint: Checkpoint, recipe: str | Recipe, dialect: str | Dialect | None, calibration: Calibration | None
) -> Draft:
    """Open the recipe and the dialect; refuse sources that cannot be written in any other form."""
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    target = find_dialect(dialect or recipe.dialect or "halfbyte")
    enforce(check_source(checkpoint))
    source = checkpoint.dialect
    target = source if source and source.name == target.name else target.for_model(checkpoint.inventory)
    family = checkpoint.family.note
    return Draft(checkpoint, recipe, target, calibration, (*recipe.notes, *([family] if family else [])))


def _assign_formats(draft: Draft) -> Draft:
    """Give every weight its fate, by the last rule that matches it; members of a fusion group stay together."""
    weights = [w.untransposed() for w in draft.checkpoint.weights]
    decisions = resolve(draft.recipe, weights)
    items = [assign(draft.checkpoint, w, d, draft.dialect) for w, d in zip(weights, decisions, strict=True)]
    if not any(item.format for item in items):
        source = draft.checkpoint.inventory.source
        raise PlanError(f"recipe {draft.recipe.name} quantizes nothing in {source}; check its rules")
    enforce(check_groups(items))
    return replace(draft, decisions=tuple(decisions), items=requantized_together(items))


def _choose_activations(draft: Draft) -> Draft:
    """Note what the rules ask of activations, and respell or drop the scales that the source has for them."""
    items = with_wishes(draft.items, draft.decisions, draft.dialect)
    respelled = respell_input_scales(draft.checkpoint, items, draft.dialect)
    return replace(draft, items=respelled.items, notes=(*draft.notes, *respelled.notes))


def _add_activation_scales(draft: Draft) -> Draft:
    """Add the scales of activations that rules ask for and the source lacks."""
    return replace(draft, scales=calibrated_scales(draft.items, draft.dialect, draft.calibration))


def _add_cache_scales(draft: Draft) -> Draft:
    """Respell the source's scales of a KV cache, and add those that the recipe asks for."""
    inherited = respell_caches(draft.checkpoint, draft.items, draft.dialect)
    caches = add_cache_scales(draft.checkpoint, draft.recipe, inherited, draft.dialect, draft.calibration)
    return replace(
        draft,
        items=caches.items,
        scales=draft.scales + caches.added,
        caches=caches.settings,
        notes=(*draft.notes, *caches.notes),
    )


def _describe_activations(draft: Draft) -> Draft:
    """Find out how engines will quantize the inputs of every weight."""
    return replace(draft, activations=activation_settings(draft.checkpoint, draft.all_items, draft.dialect))


def _use_calibration(draft: Draft) -> Draft:
    """Decide which searches are weighted, which weights are rounded with Hessians, and which groups are smoothed."""
    enforce(check_tied(draft.checkpoint.inventory.config, draft.items))
    items, notes = draft.items, optional_note(draft.recipe, draft.decisions)
    use = None
    if draft.calibration is None:
        enforce(check_calibration(draft.recipe, items, draft.decisions))
    else:
        enforce(check_rounded(draft.recipe, draft.dialect, draft.calibration))
        items, use = use_calibration(
            draft.checkpoint, draft.recipe, items, draft.decisions, draft.calibration, scales=bool(draft.scales)
        )
        notes = use.notes()
    return replace(draft, items=items, use=use, notes=(*draft.notes, *notes, *fitted_note(items)))


def _place(draft: Draft, limit: int) -> list[Shard]:
    """Distribute all output tensors over files of at most ``limit`` bytes."""
    spelled = [(i.weight, i.format, list(i.outputs)) for i in draft.all_items if i.outputs]
    container = draft.dialect.package.container(draft.checkpoint.inventory, draft.recipe.name, spelled)
    return make_shards(draft.all_items, limit, container)


def _finish(
    draft: Draft,
    shards: list[Shard],
    limit: int,
    extra_files: dict[str, bytes],
    extra_config: Mapping[str, Any] | None,
) -> Plan:
    """Write configuration and provenance, and collect the notes."""
    checkpoint, dialect, formats = draft.checkpoint, draft.dialect, draft.stored_formats()
    quantized = [(i.weight, fmt) for i in draft.all_items if (fmt := formats.get(i.weight.name))]
    kept: list[Weight] = [i.weight for i in draft.all_items if i.action != "drop" and not formats[i.weight.name]]
    settings = make_settings(dialect, quantized, kept, draft.activations, draft.caches)
    plan = Plan(
        checkpoint=checkpoint,
        recipe=draft.recipe,
        dialect=dialect,
        items=list(draft.all_items),
        shards=shards,
        index=None if dialect.package.standalone else make_index(shards),
        config=make_config(checkpoint, dialect, settings, extra_config),
        origin=make_provenance(checkpoint, draft.recipe, dialect, draft.use),
        extra_files=dialect.package.extra_files(settings) | extra_files,
        notes=[
            *draft.notes,
            *notes_on_reach(draft.recipe, draft.items),
            *_file_notes(draft, shards, limit),
            *dialect.notes(quantized, kept),
        ],
        calibration_use=draft.use,
    )
    enforce(check_names(plan.file_bytes))
    enforce(check_readable(checkpoint.inventory.root, plan.side_files))
    return plan


def _file_notes(draft: Draft, shards: list[Shard], limit: int) -> list[str]:
    notes, ignored = [], draft.checkpoint.inventory.ignored_files
    if ignored:
        more = f" and {len(ignored) - _SHOWN} more (`inspect` lists all)" if len(ignored) > _SHOWN else ""
        notes.append(f"not part of the checkpoint, not copied: {', '.join(ignored[:_SHOWN])}{more}")
    if MODELOPT_FILE in draft.checkpoint.inventory.side_files and draft.checkpoint.dialect is None:
        notes.append(f"{MODELOPT_FILE} is not copied: engines would believe it, and the source is not quantized so")
    large = [shard.name for shard in shards if shard.layout.total > limit]
    if large:
        notes.append(f"larger than {limit} bytes, as what it holds cannot be divided: {', '.join(large[:5])}")
    return notes
