"""Building a plan: every tensor's fate and place, decided from headers, a recipe and a dialect."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from halfbyte.calibration import Calibration
from halfbyte.checkpoint.files import collector_paused
from halfbyte.dialects import Dialect, OutputTensor, get_dialect, quantization_config_of, unquantized_config
from halfbyte.errors import FormatError, PlanError
from halfbyte.formats import get_format
from halfbyte.models import Weight
from halfbyte.plan.activation_scales import calibrated as calibrated_scales
from halfbyte.plan.activation_scales import choose as choose_activations
from halfbyte.plan.activation_scales import settled as settled_activations
from halfbyte.plan.calibration_use import optional_note, settle
from halfbyte.plan.conversion_plan import PLAN_VERSION, Plan
from halfbyte.plan.fusion_groups import check_groups, check_tied
from halfbyte.plan.global_scales import check_fitted, fitted_note
from halfbyte.plan.kv_cache import settle_caches
from halfbyte.plan.shards import Item, make_index, make_shards
from halfbyte.plan.transcoding import claim, misfit, obstacle, respelled, settle_input_scales
from halfbyte.recipes import Decision, Recipe, load_recipe, resolve
from halfbyte.search import get_search
from halfbyte.source.checkpoint import FLOATS, Checkpoint
from halfbyte.source.smoothing import FOLDS

MAX_SHARD_BYTES = 5_000_000_000


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
    if checkpoint.dialect and checkpoint.dialect.package.standalone:
        raise PlanError(
            f"{inventory.source} is in the dialect {checkpoint.dialect.name}, which inspect and verify read, but its "
            "configuration and tokenizer cannot be written in another form; start from the original checkpoint"
        )
    source = checkpoint.dialect
    dialect = source if source and source.name == dialect.name else dialect.for_model(inventory)
    if max_shard_bytes is None:
        max_shard_bytes = sys.maxsize if dialect.package.standalone else MAX_SHARD_BYTES
    weights = [w.untransposed() for w in checkpoint.weights]
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
    calibration_use = settle(checkpoint, recipe, items, decisions, calibration, scales=bool(more))
    notes += calibration_use.notes() if calibration_use else optional_note(recipe, decisions)
    notes += fitted_note(items)
    items += more
    spelled = [(i.weight, i.format, i.outputs) for i in items if i.outputs]
    shards = make_shards(items, max_shard_bytes, dialect.package.container(inventory, recipe.name, spelled))
    # what is kept may be quantized already, and the configuration has to say so
    formats = {i.weight.name: i.format or checkpoint.formats.get(i.weight.name) for i in items if i.action != "drop"}
    quantized = [(i.weight, fmt) for i in items if (fmt := formats.get(i.weight.name))]
    kept = [i.weight for i in items if i.action != "drop" and not formats[i.weight.name]]
    config = unquantized_config(source.package.original_config(inventory.config) if source else inventory.config)
    config |= dict(extra_config or {})
    config["quantization_config"] = settings = dialect.config(quantized, kept, activations)
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
    if calibration_use:
        provenance["importance"] = {
            "name": calibration_use.calibration.name,
            "digest": calibration_use.calibration.digest,
        }
        provenance["folds"] = FOLDS if calibration_use.smoothings else None
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
        None if dialect.package.standalone else make_index(shards),
        None if dialect.package.standalone else _json(dialect.package.config_json(config)),
        _json(provenance),
        dialect.package.extra_files(settings) | (extra_files or {}),
        notes + dialect.notes(quantized, kept),
        calibration_use,
    )


def _recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe that can be parsed again, with the defaults of this release spelled out."""
    told = recipe.model_dump(mode="json", exclude_none=True)
    for rule in told["rules"]:
        if "format" not in rule:
            for key in ("search", "global_scale", "indivisible"):
                del rule[key]
    return told


def _item(checkpoint: Checkpoint, weight: Weight, decision: Decision, dialect: Dialect) -> Item:
    if decision.action == "drop":
        return Item(weight, "drop", decision.reason)
    if decision.action == "keep":
        return _kept(checkpoint, weight, decision.reason, dialect)
    assert decision.format is not None and decision.search is not None
    fmt = dialect.spelling.format_for(weight, get_format(decision.format))
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
    problem = dialect.spelling.problem(weight, fmt)
    if problem:
        raise PlanError(f"{weight.name}: {problem}")
    power = decision.global_scale == "power_of_two" or dialect.spelling.power_of_two
    before = checkpoint.formats.get(weight.name)
    if before:
        checkpoint.stored(weight)  # a missing part is found now and not in the middle of the conversion
    said = claim(weight, before, fmt, checkpoint.dialect, dialect) if before and checkpoint.dialect else None
    outputs = respelled(checkpoint, weight, fmt, dialect) if said else dialect.spelling.outputs(weight, fmt)
    action, reason = ("transcode", said) if said else ("quantize", decision.reason)
    fitted = decision.global_scale == "soar"
    return Item(weight, action, reason, fmt, decision.search, power, outputs, fitted=fitted)


def _kept(checkpoint: Checkpoint, weight: Weight, reason: str, dialect: Dialect) -> Item:
    """A kept weight's tensors as the source has them; in another dialect a quantized one keeps its codes."""
    tensors = checkpoint.inventory.tensors
    before, source = checkpoint.formats.get(weight.name), checkpoint.dialect
    if before is None or source is None:
        left_out = dialect.unquantized.omitted(weight)
        if left_out:
            return Item(weight, "drop", left_out)
        if source is dialect:
            found = [tensors[name] for name in checkpoint.tensors_of(weight)]
            outputs = [OutputTensor(t.name, t.dtype, t.shape, "copy") for t in found]
            return Item(weight, "keep", reason, outputs=outputs)
        if checkpoint.tensors_of(weight) != list(weight.sources):
            return Item(weight, "keep", reason, outputs=dialect.unquantized.outputs(weight, [_original(weight)]))
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
        outputs = dialect.unquantized.outputs(weight, outputs)
    return Item(weight, "keep", reason, outputs=outputs)


def _original(weight: Weight) -> OutputTensor:
    """A weight that the source spells in its own way, as a plain checkpoint has it."""
    lying = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2]) if weight.transposed else weight.shape
    return OutputTensor(weight.sources[0], weight.dtype, lying, "transposed" if weight.transposed else "values")


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
