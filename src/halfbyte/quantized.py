"""Weights that a source holds quantized already: which keep their codes, in which spelling, and what is said of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from halfbyte.dialects import Dialect, OutputTensor
from halfbyte.formats import BlockFormat, Format
from halfbyte.formats.transcode import may_transcode
from halfbyte.models import Weight
from halfbyte.view import Checkpoint

LOSSLESS = "lossless: the same codes and scales"
WHERE_SHARED = "lossless where projections that engines fuse share a scale, else requantized"
WHERE_FITTING = "lossless where the exponents fit, else requantized"
RECIPROCAL = "the same codes and block scales; the tensor scale becomes its reciprocal, rounded to FP32"
REQUANTIZED = "requantized, since it shares a tensor scale with weights that are not quantized"
INPUT_SCALE = "a calibrated scale of activations, which this output does not quantize"

# what holds every value of a type of scales, the type itself first
_HOLDS = {"BF16": ("BF16", "F32"), "F16": ("F16", "F32"), "F32": ("F32",), "F8_E8M0": ("BF16", "F32")}


def claim(weight: Weight, before: Format, after: Format, source: Dialect, target: Dialect) -> str | None:
    """What a plan may promise about a quantized weight's values in another spelling; None: it is requantized.

    ``LOSSLESS`` is said only where it holds whatever the codes and scales are.
    """
    if not may_transcode(before, after):
        return None
    if before != after:
        return WHERE_FITTING
    if not shares_scale(after):
        return LOSSLESS
    if isinstance(after, BlockFormat) and after.has_tensor_scale and source.divisor != target.divisor:
        return RECIPROCAL
    return WHERE_SHARED if weight.group or weight.row_parts else LOSSLESS


def shares_scale(fmt: Format | None) -> bool:
    """Whether matrices that engines fuse must have one scale in this format."""
    return isinstance(fmt, BlockFormat) and (fmt.has_tensor_scale or fmt.block == (-1, -1))


def respelled(checkpoint: Checkpoint, weight: Weight, fmt: Format, dialect: Dialect) -> list[OutputTensor]:
    """The tensors that hold a quantized weight in an output, with scales of a type that rounds none of them.

    In the dialect of the source they are spelled as there, to the byte.
    """
    if checkpoint.dialect is dialect and checkpoint.formats[weight.name] == fmt and not weight.transposed:
        return list(checkpoint.stored(weight))
    outputs = dialect.outputs(weight, fmt)
    if checkpoint.formats[weight.name] != fmt or np.dtype(fmt.parts((128, 256))["scales"][0]).itemsize == 1:
        return outputs
    found = {o.dtype for o in checkpoint.stored(weight) if o.part == "scales"}
    return [o._replace(dtype=_holding(found, o.dtype)) if o.part == "scales" else o for o in outputs]


def left_out(source: Checkpoint, target: Dialect, formats: Mapping[str, Format | None]) -> set[str]:
    """Scales of activations that an output does not need: those of modules that are not as they were.

    ``formats``: the format that each weight (by name) has in the output.
    """
    if source.dialect is None or not source.dialect.input_scales:
        return set()
    scales = [w.name for w in source.weights if w.name.endswith(source.dialect.input_scales)]
    if not scales or source.dialect is not target:
        return set(scales)
    same = {
        piece.source
        for weight in source.weights
        if weight.name in source.formats and formats.get(weight.name) == source.formats[weight.name]
        for piece in weight.pieces
    }
    return {name for name in scales if f"{name.rpartition('.')[0]}.weight" not in same}


def _holding(found: Collection[str], ours: str) -> str:
    return next((kind for kind in (ours, "BF16", "F16", "F32") if all(kind in _HOLDS.get(f, ()) for f in found)), ours)
