"""Weights that a source holds quantized already: which keep their codes, in which spelling, and what is said of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from halfbyte.dialects import Dialect, OutputTensor
from halfbyte.errors import FormatError
from halfbyte.formats import Format
from halfbyte.formats.transcode import may_transcode
from halfbyte.models import Weight
from halfbyte.plan.refusal import Refusal
from halfbyte.plan.shards import Item
from halfbyte.source.checkpoint import Checkpoint

LOSSLESS = "lossless: the same codes and scales"
WHERE_SHARED = "lossless where projections that engines fuse share a scale, else requantized"
WHERE_FITTING = "lossless where the exponents fit, else requantized"
RECIPROCAL = "the same codes and block scales; the global scale becomes its reciprocal, rounded to FP32"
REQUANTIZED = "requantized, since it shares a global scale with weights that are not quantized"
RESPELLED_INPUT = "the calibrated scale of activations in another spelling"
INPUT_SCALE = "a calibrated scale of activations, which this output does not quantize"

# what holds every value of a type of scales, the type itself first
_HOLDS = {"BF16": ("BF16", "F32"), "F16": ("F16", "F32"), "F32": ("F32",), "F8_E8M0": ("BF16", "F32")}


def describe_transcoding(weight: Weight, before: Format, after: Format, source: Dialect, target: Dialect) -> str | None:
    """What a plan may promise about a quantized weight's values in another spelling; None: it is requantized.

    ``LOSSLESS`` is said only where it holds whatever the codes and scales are.
    """
    if not may_transcode(before, after):
        return None
    if before != after:
        return WHERE_FITTING
    if not after.shares_scale:
        return LOSSLESS
    if after.has_global_scale and target.spelling.power_of_two and source is not target:
        return None
    if after.has_global_scale and source.spelling.global_scale_inv != target.spelling.global_scale_inv:
        return RECIPROCAL
    return WHERE_SHARED if weight.group or weight.row_parts else LOSSLESS


def check_shape(weight: Weight, fmt: Format, dialect: Dialect) -> Refusal | None:
    """Refuse a weight whose shape does not fit a format as the dialect has it; a recipe may keep such a weight."""
    if len(weight.shape) < 2:
        return Refusal("it is a vector and no matrix", FormatError)
    problem = fmt.problem(weight.shape) or dialect.spelling.shape_problem(weight, fmt)
    return Refusal(problem, FormatError) if problem else None


def check_transcoding(weight: Weight, fmt: Format, target: Dialect) -> Refusal | None:
    """Refuse a quantized weight of another dialect that cannot keep its codes and scales in ``target``."""
    problem = target.spelling.problem(weight, fmt)
    if problem:
        return Refusal(problem)
    stands = target.spelling.format_for(weight, fmt)
    if stands != fmt:
        return Refusal(f"its engines read {weight.name} in {stands.name} and not in {fmt.name}")
    if fmt.has_global_scale and target.spelling.power_of_two:
        return Refusal(
            "it stores global scales exactly only where they are powers of two, so that the codes must be made anew"
        )
    return check_shape(weight, fmt, target)


def respelled(checkpoint: Checkpoint, weight: Weight, fmt: Format, dialect: Dialect) -> list[OutputTensor]:
    """The tensors that hold a quantized weight in an output, with scales of a type that rounds none of them.

    In the dialect of the source they are spelled as there, to the byte.
    """
    if checkpoint.dialect is dialect and checkpoint.formats[weight.name] == fmt and not weight.transposed:
        return list(checkpoint.stored(weight))
    outputs = dialect.spelling.outputs(weight, fmt)
    if checkpoint.formats[weight.name] != fmt or np.dtype(fmt.parts((128, 256))["scales"][0]).itemsize == 1:
        return outputs
    dtypes: dict[str, set[str]] = {}
    for o in checkpoint.stored(weight):
        dtypes.setdefault(o.part, set()).add(o.dtype)
    wide = [part for part, (kind, _) in fmt.parts((128, 256)).items() if np.dtype(kind).itemsize > 1]
    return [o._replace(dtype=_wide_enough(dtypes[o.part], o.dtype)) if o.part in wide else o for o in outputs]


def input_scales(
    source: Checkpoint, target: Dialect, formats: Mapping[str, Format | None]
) -> dict[str, OutputTensor | None]:
    """What becomes of calibrated scales of activations, by name: another spelling, or None where they are left out.

    They stay where their module keeps its format, and those that also keep their spelling are not named here.
    ``formats``: the format that each weight (by name) has in the output.
    """
    dialect = source.dialect
    if dialect is None or not dialect.activations.endings:
        return {}
    scales = [w for w in source.weights if w.name.endswith(dialect.activations.endings)]
    same = {
        piece.source: source.formats[weight.name]
        for weight in (source.weights if scales else ())
        if weight.name in source.formats and formats.get(weight.name) == source.formats[weight.name]
        for piece in weight.pieces
    }
    outputs: dict[str, OutputTensor | None] = {}
    for weight in scales:
        module, _, ending = weight.name.rpartition(".")
        fmt = same.get(f"{module}.weight")
        if fmt is None or dialect is not target:
            old, new = (d.activations.scale(fmt) if fmt else None for d in (dialect, target))
            if old is None or new is None or old.ending != f".{ending}":
                outputs[weight.name] = None
            else:
                part = "reciprocal" if old.global_scale_inv != new.global_scale_inv else "same"
                outputs[weight.name] = OutputTensor(module + new.ending, "F32", new.shape, part)
    return outputs


class Respelled(NamedTuple):
    """All items of a plan, some of them in another spelling, and the notes that say so."""

    items: tuple[Item, ...]
    notes: list[str]


def respell_input_scales(checkpoint: Checkpoint, items: Sequence[Item], dialect: Dialect) -> Respelled:
    """Respell or drop the calibrated scales of activations."""
    weights_only = ("none", "dynamic")
    formats = {
        i.weight.name: i.format or checkpoint.formats.get(i.weight.name)
        for i in items
        if i.outputs and i.activations not in weights_only
    }
    outputs = input_scales(checkpoint, dialect, formats)
    respelled_items = tuple(
        _with_input_scale(i, outputs[i.weight.name]) if i.weight.name in outputs else i for i in items
    )
    dropped = sum(output is None for output in outputs.values())
    note = f"scales of activations are left out ({dropped}): this output quantizes weights only"
    return Respelled(respelled_items, [note] if dropped else [])


def _with_input_scale(item: Item, output: OutputTensor | None) -> Item:
    if output is None:
        return replace(item, action="drop", reason=INPUT_SCALE, outputs=())
    weight = replace(item.weight, name=output.name)
    return replace(item, weight=weight, action="transcode", reason=RESPELLED_INPUT, outputs=(output,))


def _wide_enough(dtypes: Collection[str], preferred: str) -> str:
    """The first type that holds every scale of these types, the preferred one where it does."""
    kinds = (preferred, "BF16", "F16", "F32")
    return next((kind for kind in kinds if all(kind in _HOLDS.get(dtype, ()) for dtype in dtypes)), preferred)
