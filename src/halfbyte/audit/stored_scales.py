"""The scales of a checkpoint, read and judged without a source: NaN, zero, subnormal, unequal, never calibrated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from halfbyte.audit.finding import Finding, count, some, verb
from halfbyte.checkpoint import Reader
from halfbyte.dialects import OutputTensor
from halfbyte.dialects.modules import modules
from halfbyte.formats import Format
from halfbyte.formats.arrays import Array
from halfbyte.models.roles import bare_role, is_under
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.fused_scales import fused_scales

# of the blocks of one matrix; fewer are rounding at the edge of a type
_SUBNORMAL_SHARE = 0.05


@dataclass
class ScaleCounts:
    """What was counted over all quantized weights; lists hold names of tensors."""

    nan: list[str] = field(default_factory=list)
    vanished: dict[str, int] = field(default_factory=dict)
    subnormal: dict[str, float] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    bad_global: list[str] = field(default_factory=list)
    blocks: int = 0


def check_scales(checkpoint: Checkpoint, reader: Reader) -> Iterator[Finding]:
    """Findings about the scales of weights, of their inputs and of the KV cache."""
    counts = ScaleCounts()
    for weight in checkpoint.weights:
        fmt = checkpoint.formats.get(weight.name)
        if fmt is None:
            continue
        outputs = checkpoint.stored(weight)
        for output in outputs:
            if output.part == "scales" and not fmt.scale_per_matrix:
                _count_scales(counts, reader, outputs, output, fmt)
            elif output.part in ("scales", "global_scale") and not _all_positive(reader.read(output.name)):
                counts.bad_global.append(output.name)
    yield from _described(counts)
    yield from _unequal(checkpoint, reader)
    yield from _inputs(checkpoint, reader)
    yield from _caches(checkpoint, reader)


def _count_scales(
    counts: ScaleCounts, reader: Reader, outputs: list[OutputTensor], output: OutputTensor, fmt: Format
) -> None:
    stored = reader.read(output.name)
    plain = fmt.plain
    values = plain.split_scales(stored.view(np.uint8) if stored.dtype.itemsize == 1 else stored)[0]
    counts.blocks += values.size
    finite = np.isfinite(values)
    if not finite.all():
        counts.nan.append(output.name)
    zero = values == 0
    if zero.all():
        counts.empty.append(output.name)
    elif zero.any():
        lost = _codes_under(zero, reader, outputs, output, plain)
        if lost:
            counts.vanished[output.name] = lost
    smallest = _smallest_normal(plain)
    if smallest and not zero.all():
        share = float((np.abs(values[~zero]) < smallest).mean())
        if share > _SUBNORMAL_SHARE:
            counts.subnormal[output.name] = share


def _codes_under(zero: Array, reader: Reader, outputs: list[OutputTensor], output: OutputTensor, fmt: Format) -> int:
    """How many blocks have a scale of zero and codes that are no zeros."""
    if fmt.bits != 4 or fmt.block[0] != 1 or zero.ndim != 2:
        return 0
    codes = next(o for o in outputs if o.part == "codes" and o.expert == output.expert and o.rows == output.rows)
    stored = np.ascontiguousarray(reader.read(codes.name)).view(np.uint8)
    blocks = stored.reshape(*zero.shape, -1)
    # -0 is a zero too
    return int(np.count_nonzero(((blocks & 0x77) != 0).any(axis=-1) & zero))


def _smallest_normal(fmt: Format) -> float:
    """The smallest scale that has all bits of its mantissa, 0 where every scale has."""
    name = fmt.scale.name if fmt.scale is not None else ""
    return 2.0**-6 if name.startswith("e4m3") else 0.0


def _described(counts: ScaleCounts) -> Iterator[Finding]:
    if counts.nan:
        what = (
            f"{count(len(counts.nan), 'tensor')} of scales "
            f"{verb(len(counts.nan), 'hold')} NaN or infinity: {some(counts.nan)}"
        )
        yield Finding("wrong", "scale-not-finite", what, tuple(counts.nan), "quantize these weights again")
    if counts.bad_global:
        what = (
            f"{count(len(counts.bad_global), 'global scale')} {verb(len(counts.bad_global), 'are')} zero, negative or "
            f"not finite: {some(counts.bad_global)}"
        )
        yield Finding("wrong", "global-scale", what, tuple(counts.bad_global), "quantize these weights again")
    if counts.vanished:
        blocks = sum(counts.vanished.values())
        what = (
            f"{count(blocks, 'block')} in {count(len(counts.vanished), 'tensor')} {verb(blocks, 'have')} a scale of "
            f"zero and codes that are not: their scale was too small for its type "
            f"and the weights are lost ({some(counts.vanished)})"
        )
        yield Finding(
            "poor",
            "scale-underflow",
            what,
            tuple(counts.vanished),
            "quantize these weights again",
            ("NVIDIA/Model-Optimizer#1382",),
        )
    if counts.empty:
        experts = [name for name in counts.empty if "expert" in name]
        kind = "experts that can add nothing" if len(experts) == len(counts.empty) else "matrices of zeros"
        what = (
            f"{count(len(counts.empty), 'tensor')} of scales "
            f"{verb(len(counts.empty), 'are')} all zero, {kind}: {some(counts.empty)}"
        )
        yield Finding("poor", "dead-matrix", what, tuple(counts.empty))
    if counts.subnormal:
        worst = max(counts.subnormal, key=lambda name: counts.subnormal[name])
        what = (
            f"{count(len(counts.subnormal), 'tensor')} {verb(len(counts.subnormal), 'keep')} many block scales below "
            f"the normal numbers of their type, with fewer bits of precision; most "
            f"of all {worst} ({counts.subnormal[worst]:.0%} of its blocks)"
        )
        yield Finding("poor", "scale-subnormal", what, tuple(counts.subnormal), "a larger global scale would mend it")


def _unequal(checkpoint: Checkpoint, reader: Reader) -> Iterator[Finding]:
    """Projections that engines fuse, under different global scales."""
    groups: dict[str, dict[str, float]] = {}
    for scale in fused_scales(checkpoint, reader):
        if math.isfinite(scale.value) and scale.value > 0:
            groups.setdefault(scale.group, {})[scale.tensor] = scale.value
    unlike = {key: members for key, members in groups.items() if len(set(members.values())) > 1}
    if not unlike:
        return
    ratios = {key: max(members.values()) / min(members.values()) for key, members in unlike.items()}
    worst = max(ratios, key=lambda key: ratios[key])
    what = (
        f"{count(len(unlike), 'group')} of projections that engines fuse {verb(len(unlike), 'have')} different "
        f"global scales, and engines use one for all of them; the worst is "
        f"{some(unlike[worst])}, by a factor of {ratios[worst]:.3g}"
    )
    names = tuple(name for members in unlike.values() for name in members)
    yield Finding(
        "wrong",
        "unequal-global-scales",
        what,
        names,
        "`halfbyte repair` encodes them again from the source, with one scale",
        ("vllm-project/vllm#54974", "vllm-project/llm-compressor#1869"),
    )


def _inputs(checkpoint: Checkpoint, reader: Reader) -> Iterator[Finding]:
    """Calibrated scales of inputs: there where the configuration wants them, and nowhere else; finite, positive."""
    dialect, inventory = checkpoint.dialect, checkpoint.inventory
    if dialect is None or not dialect.activations.endings:
        return
    names = [name for name in inventory.tensors if name.endswith(dialect.activations.endings)]
    bad = tuple(n for n in names if not _all_positive(reader.read(n)))
    if bad:
        what = f"{count(len(bad), 'scale')} of inputs {verb(len(bad), 'are')} zero, negative or not finite: {some(bad)}"
        yield Finding("wrong", "input-scale", what, bad, "calibrate again, with text that reaches these modules")
    takes, missing, wanted, idle = dialect.activations.takes_scales(inventory), [], 0, 0
    for weight in checkpoint.weights:
        fmt = checkpoint.formats.get(weight.name)
        if fmt is None:
            continue
        for module in modules(weight):
            static = takes(weight, fmt, module.name)
            there = any(f"{module.name}{ending}" in inventory.tensors for ending in dialect.activations.endings)
            wanted += static
            idle += there and not static
            if static and not there:
                missing.append(module.name)
    if missing and len(missing) == wanted:
        what = (
            f"the configuration quantizes the inputs of {count(wanted, 'module')} with calibrated scales and there "
            "is none: it is a W4A16 file that calls itself W4A4"
        )
        yield Finding("wrong", "declared-w4a4", what, tuple(missing), "`halfbyte repair` corrects the configuration")
    elif missing:
        what = (
            f"{count(len(missing), 'module')} of {wanted:,} {verb(len(missing), 'lack')} the calibrated scale of "
            f"their inputs; engines that start from zero divide by it: {some(missing)}"
        )
        advice = "calibrate with text that reaches these experts"
        yield Finding("wrong", "input-scale-missing", what, tuple(missing), advice, ("vllm-project/vllm#45212",))
    if idle:
        what = (
            f"{count(idle, 'module')} {verb(idle, 'have')} a calibrated scale of their inputs, which "
            f"the configuration does not quantize"
        )
        yield Finding("note", "declared-w4a16", what, advice="engines run them as W4A16 and ignore the scales")


def _caches(checkpoint: Checkpoint, reader: Reader) -> Iterator[Finding]:
    """Scales of an FP8 KV cache: calibrated, or ones that nobody chose."""
    dialect, inventory = checkpoint.dialect, checkpoint.inventory
    if dialect is None or dialect.cache_scales is None:
        return
    scheme = dialect.package.inherited(inventory).get("kv_cache_scheme")
    names = [name for name in inventory.tensors if name.endswith(dialect.cache_scales.endings)]
    if scheme and not names:
        attention = any(is_under(bare_role(w.role), "attention") for w in checkpoint.weights)
        if attention:
            what = "the configuration asks for an FP8 KV cache and there are no scales for it, so engines use 1"
            yield Finding(
                "note", "cache-scale-missing", what, advice="calibrate the cache, or start the engine without it"
            )
    elif names:
        ones = tuple(name for name in names if (reader.read(name).astype(np.float32) == 1).all())
        if ones:
            what = (
                f"{len(ones)} of {count(len(names), 'scale')} of the KV cache {verb(len(names), 'are')} "
                f"exactly 1, as if nobody calibrated them"
            )
            yield Finding("note", "cache-scale-one", what, ones, "calibrate the cache")
        bad = tuple(name for name in names if not _all_positive(reader.read(name)))
        if bad:
            what = (
                f"{count(len(bad), 'scale')} of the KV cache {verb(len(bad), 'are')} "
                f"zero, negative or not finite: {some(bad)}"
            )
            yield Finding("wrong", "cache-scale", what, bad)


def _all_positive(values: Array) -> bool:
    wide = values.astype(np.float64)
    return bool((np.isfinite(wide) & (wide > 0)).all())
