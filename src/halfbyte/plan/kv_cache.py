"""Scales of a quantized KV cache: new ones from a calibration, or a source's in the output's spelling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from halfbyte.calibration import Calibration
from halfbyte.checkpoint import Reader, numpy_dtype
from halfbyte.dialects import CacheScales, Dialect, OutputTensor
from halfbyte.dialects.quantization_config import is_fp8_cache
from halfbyte.errors import PlanError, RecipeError
from halfbyte.models import Weight
from halfbyte.models.cache_modules import attention_of
from halfbyte.plan.refusal import Refusal, enforce
from halfbyte.plan.shards import Item
from halfbyte.recipes import Recipe
from halfbyte.source.checkpoint import Checkpoint

CALIBRATED = "the scale of an FP8 KV cache, from the calibration"
RESPELLED = "the scale of an FP8 KV cache in another spelling"
UNSAID = "how the source quantizes the KV cache is not said in this dialect's configuration"
MTP = (
    "calibration does not run MTP layers, so their KV cache gets no scale; engines take 1 there, as for every scale "
    "that is missing"
)
TOP = 448.0
"""The largest value of E4M3; the largest key or value becomes it."""
_KINDS = ("keys", "values")
_ROLES = ("quantized.attention.k", "quantized.attention.v")


@dataclass(frozen=True)
class Caches:
    """What an output says of its KV cache.

    ``items``: those of the source's weights, scales in the output's spelling; ``added``: items for scales that the
    source lacks; ``settings`` of its ``quantization_config``; notes.
    """

    items: tuple[Item, ...]
    added: tuple[Item, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def add_cache_scales(
    checkpoint: Checkpoint, recipe: Recipe, caches: Caches, dialect: Dialect, calibration: Calibration | None
) -> Caches:
    """Add the scales that the recipe asks for (``kv_cache``) from statistics, where the source lacks them.

    RecipeError where nothing is known of keys and values, PlanError where no engine could use the scales.
    """
    spelling = dialect.cache_scales
    if recipe.kv_cache is None:
        return caches
    enforce(check_cache_scales(checkpoint, recipe, caches, dialect))
    assert spelling is not None
    there = {output.name for item in caches.items for output in item.outputs}
    weights = [item.weight for item in caches.items if item.outputs]
    names = [(w, module, i) for w, module in _caching(weights, recipe, checkpoint) for i in range(2)]
    missing = [entry for entry in names if entry[1] + spelling.endings[entry[2]] not in there]
    if missing:
        unknown = check_statistics(recipe, calibration)
        if unknown and recipe.calibration == "optional":
            note = f"without a calibration the scales of the KV cache of {recipe.name} are left out"
            return replace(caches, notes=(*caches.notes, note))
        enforce(unknown)
    added = []
    for weight, module, i in missing:
        assert calibration is not None
        added.append(_calibrated(weight, module, i, spelling, calibration))
    notes = [note for note in caches.notes if note != UNSAID]
    if any(attention_of(w) and w.role.startswith("mtp.") for w in weights):
        notes.append(MTP)
    settings = caches.settings or {"kv_cache_scheme": dict(spelling.scheme)}
    return replace(caches, added=tuple(added), settings=settings, notes=tuple(notes))


def check_cache_scales(checkpoint: Checkpoint, recipe: Recipe, caches: Caches, dialect: Dialect) -> Refusal | None:
    """Refuse a quantized cache that the dialect has no words for, or that the source quantizes in another way."""
    if dialect.cache_scales is None:
        return Refusal(
            f"recipe {recipe.name} says `kv_cache: {recipe.kv_cache}`, but the dialect {dialect.name} has no word for "
            "scales of a KV cache; choose compressed-tensors or modelopt, or leave the key out"
        )
    if caches.settings and not is_fp8_cache(caches.settings.get("kv_cache_scheme")):
        return Refusal(
            f"recipe {recipe.name} says `kv_cache: {recipe.kv_cache}`, but {checkpoint.inventory.source} quantizes its "
            "KV cache in another way, which is kept; leave the key out"
        )
    return None


def respelled_caches(source: Checkpoint, target: Dialect) -> dict[str, OutputTensor]:
    """A source's scales of an FP8 KV cache as another dialect spells them, by their names in the source.

    Empty where the dialect stays, one of the two has no word for them, or a scale is not one number.
    """
    dialect = source.dialect
    if dialect is None or dialect is target or not (dialect.cache_scales and target.cache_scales):
        return {}
    if not is_fp8_cache(dialect.package.inherited(source.inventory).get("kv_cache_scheme")):
        return {}
    new = target.cache_scales
    modules = {module for weight in source.weights if (module := attention_of(weight))}
    outputs = {}
    for weight in source.weights:
        for before, after in zip(dialect.cache_scales.endings, new.endings, strict=True):
            module = weight.name.removesuffix(before)
            if module == weight.name or module not in modules:
                continue
            if math.prod(weight.shape) != 1:
                return {}
            # FP32 holds every scale, BF16 only those that were BF16
            dtype = new.dtype if new.dtype == "F32" else weight.dtype
            outputs[weight.name] = OutputTensor(module + after, dtype, new.shape, "same")
    return outputs


def check_caches(
    recipe: dict[str, Any], ours: Checkpoint, source: Checkpoint, reader: Reader, added: dict[str, Weight]
) -> list[str]:
    """What is wrong with the calibrated scales of an output; they are taken out of ``added``, which the source lacks.

    ``recipe`` is what halfbyte.json says. One whose calibration is optional may have left all of them out.
    """
    spelling = ours.dialect.cache_scales if ours.dialect else None
    if not recipe.get("kv_cache") or spelling is None:
        return []
    modules = {m for w in source.weights if (m := attention_of(w)) and not w.role.startswith("mtp.")}
    wanted = [module + ending for module in sorted(modules) for ending in spelling.endings]
    calibrated = [name for name in wanted if added.pop(name, None)]
    problems = []
    for name in calibrated:
        value = reader.read(name).astype(np.float32)
        if value.size != 1 or not (np.isfinite(value) & (value > 0)).all():
            problems.append(f"{name}, a scale of the KV cache, is not one positive number")
    there = {weight.name for weight in ours.weights}
    missing = [name for name in wanted if name not in there]
    if missing and (calibrated or recipe.get("calibration") != "optional"):
        problems.append(f"{missing[0]} is missing, which the recipe wants (`kv_cache`)")
    assert ours.dialect is not None
    if calibrated and not is_fp8_cache(ours.dialect.package.inherited(ours.inventory).get("kv_cache_scheme")):
        problems.append("config.json does not say that the KV cache is FP8, so engines ignore its scales")
    return problems


def respell_caches(checkpoint: Checkpoint, items: Sequence[Item], dialect: Dialect) -> Caches:
    """Keep what a source says of its KV cache; its scales are respelled where the dialect is another."""
    stated = checkpoint.dialect.package.inherited(checkpoint.inventory) if checkpoint.dialect else {}
    if checkpoint.dialect is dialect or not stated:
        return Caches(tuple(items), settings=stated)
    outputs = respelled_caches(checkpoint, dialect)
    kept = {item.weight.name for item in items if item.weight.name in outputs and item.outputs}
    respelled = tuple(_respelled(i, outputs[i.weight.name]) if i.weight.name in kept else i for i in items)
    if not kept or len(kept) < len(outputs) or dialect.cache_scales is None:
        return Caches(respelled, notes=(UNSAID,))
    return Caches(respelled, settings={"kv_cache_scheme": dict(dialect.cache_scales.scheme)})


def _respelled(item: Item, output: OutputTensor) -> Item:
    weight = replace(item.weight, name=output.name, dtype=output.dtype)
    return replace(item, weight=weight, action="transcode", reason=RESPELLED, outputs=(output,))


def _caching(weights: Sequence[Weight], recipe: Recipe, checkpoint: Checkpoint) -> list[tuple[Weight, str]]:
    """The attention modules of the main model, each with the weight that makes its keys."""
    caching = [(w, m) for w in weights if (m := attention_of(w)) and not w.role.startswith("mtp.")]
    latent = any(w.role == "attention.kv_a" for w in weights)
    if caching and not latent:
        return caching
    what = "caches latents (MLA) instead of keys and values" if latent else "has no attention that caches keys"
    raise PlanError(
        f"recipe {recipe.name} says `kv_cache: {recipe.kv_cache}`, but {checkpoint.inventory.source} {what}, for which "
        "no scales are calibrated; leave the key out"
    )


def check_statistics(recipe: Recipe, calibration: Calibration | None) -> Refusal | None:
    """Refuse a recipe that needs statistics of keys and values where there are none."""
    statistics = calibration.statistics if calibration else None
    if statistics is not None and statistics.description.get("caches"):
        return None
    if calibration is None:
        why = "there is no calibration of keys and values; give text or statistics (--calibration PATH)"
    elif statistics is None:
        why = f"{calibration.name} is an importance file, without keys and values; give text or statistics instead"
    else:
        why = f"{calibration.name} comes from an older halfbyte, without keys and values; calibrate again"
    return Refusal(
        f"recipe {recipe.name} says `kv_cache: {recipe.kv_cache}`, but {why}, or set `calibration: optional` in the "
        "recipe",
        RecipeError,
    )


def _calibrated(weight: Weight, module: str, i: int, spelling: CacheScales, calibration: Calibration) -> Item:
    assert calibration.statistics is not None
    amax = calibration.statistics.array(module, _KINDS[i])
    if amax is None:
        raise PlanError(
            f"{module}: the calibration saw no {_KINDS[i]} that this layer would keep in a cache of its own; leave "
            "`kv_cache` out of the recipe"
        )
    value = np.float32(np.max(amax)) / np.float32(TOP)
    number = float(value.astype(numpy_dtype(spelling.dtype)))
    if not (math.isfinite(number) and number > 0):
        raise PlanError(
            f"{module}: the largest of the {_KINDS[i]} that the calibration saw is {float(np.max(amax)):g}, which "
            "gives no scale; calibrate with more text"
        )
    name = module + spelling.endings[i]
    output = OutputTensor(name, spelling.dtype, spelling.shape, "constant", constant=(number,))
    scale = Weight(name, _ROLES[i], weight.layer, spelling.shape, spelling.dtype, ())
    return Item(scale, "calibrate", CALIBRATED, outputs=(output,))
