"""A converted checkpoint beside its source: every tensor accounted for, kept ones identical, errors in bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.checkpoint import Reader, numpy_dtype
from halfbyte.dialects import OutputTensor
from halfbyte.errors import CheckpointError
from halfbyte.formats import Format, QuantizedTensor, get_format
from halfbyte.kernels import amax
from halfbyte.kernels.tensor_error import TensorError, largest_relmse
from halfbyte.models import Weight
from halfbyte.plan.kv_cache import check_caches, respelled_caches
from halfbyte.plan.resources import SLICE_BYTES
from halfbyte.plan.transcoding import INPUT_SCALE, LOSSLESS, check_shape, describe_transcoding, input_scales
from halfbyte.recipes import Decision
from halfbyte.recipes.resolve import refits
from halfbyte.search.blocks import to_blocks
from halfbyte.source.checkpoint import FLOATS, Checkpoint
from halfbyte.source.fused_scales import fused_scales
from halfbyte.source.smoothing import SMOOTHING_FILE, Smoothing, resmoothed
from halfbyte.verify.verification import Verification


@dataclass
class CheckpointPair:
    """A converted checkpoint beside its source, both open."""

    result: Verification
    ours: Checkpoint
    source: Checkpoint
    left: Reader
    right: Reader
    max_relmse: float
    smoothings: dict[str, Smoothing]
    training: dict[str, Any] = field(default_factory=dict)
    """What the output's halfbyte.json says of its training: weights have moved then, kept ones that it names too."""

    def check_all(self, decisions: dict[str, Decision], record: dict[str, Any], report: Callable[[int], None]) -> None:
        """Every weight of the source, and what is in the output besides."""
        dialect, tensors = self.ours.dialect, self.source.inventory.tensors
        assert dialect is not None
        rest = {weight.name: weight for weight in self.ours.weights}
        scales = input_scales(self.source, dialect, self.ours.formats)
        spelled = {**scales, **respelled_caches(self.source, dialect)}
        for weight in self.source.weights:
            respelled = spelled.get(weight.name)
            twin = rest.pop(respelled.name if respelled else weight.name, None)
            if twin is not None and respelled and not _dropped(decisions, weight):
                self.respelled(weight, respelled)
            elif twin is None and weight.name in scales and not _dropped(decisions, weight):
                self.result.dropped[weight.name] = INPUT_SCALE
            else:
                self._one(weight, twin, decisions.get(weight.name))
            report(sum(tensors[name].nbytes for name in weight.sources if name in tensors))
        problems = self.result.problems
        if any(decision.activations == "static" for decision in decisions.values()):
            problems += self._static_scales(rest)
        problems += check_caches(record.get("recipe") or {}, self.ours, self.source, self.left, rest)
        problems += [f"{name} is not in the source; it does not belong here" for name in rest]
        problems += _shared_scales(self.ours, self.left)

    def _one(self, weight: Weight, twin: Weight | None, decision: Decision | None) -> None:
        """A weight that is dropped, missing, or to be compared."""
        assert self.ours.dialect is not None
        problems, dropped = self.result.problems, self.result.dropped
        if decision and decision.action == "drop":
            dropped[weight.name] = decision.reason
            if twin is not None:
                problems.append(f"{weight.name} is there, but the recipe drops it")
        elif twin is None and (reason := self.ours.dialect.unquantized.omitted(weight)):
            dropped[weight.name] = reason
        elif twin is None:
            problems.append(f"{weight.name} of the source is missing, and no rule of the recipe drops it")
        else:
            try:
                self.check(weight, twin, decision)
            except CheckpointError as error:
                problems.append(str(error))

    def _static_scales(self, rest: dict[str, Weight]) -> Iterator[str]:
        """Problems of the scales of activations that a calibration added; they are taken out of ``rest``."""
        assert self.ours.dialect is not None
        for name in [name for name in rest if name.endswith(self.ours.dialect.activations.endings)]:
            value = self.left.read(rest.pop(name).name)
            if value.size != 1 or not (np.isfinite(value) & (value > 0)).all():
                yield f"{name}, a scale of activations, is not one positive number"

    def check(self, weight: Weight, twin: Weight, decision: Decision | None) -> None:
        """One weight, against what the recipe wants of it, or against what it seems to be where there is none."""
        fmt, before = self.ours.formats.get(twin.name), self.source.formats.get(weight.name)
        if decision is None:
            wanted, keep = fmt, fmt == before
        else:
            assert self.ours.dialect is not None
            stated = get_format(decision.format) if decision.format else None
            wanted = self.ours.dialect.spelling.format_for(weight, stated) if stated else before
            keep = decision.action == "keep"
            if wanted and check_shape(twin, wanted, self.ours.dialect) and decision.if_not_divisible == "keep":
                wanted, keep = before, True
        if fmt != wanted:
            names = [f.name if f else "unquantized" for f in (fmt, wanted)]
            self.result.problems.append(f"{weight.name} is {names[0]}, but the recipe wants it {names[1]}")
        if fmt is None and set(weight.sources) & set(self.training.get("kept_trained", ())):
            self._moved(weight, twin)
        elif keep and fmt is None and before is None and self._spelled(weight, twin):
            self._same(weight, twin)
        elif keep and (before is None or self.ours.dialect is self.source.dialect):
            self._kept(weight, [o.name for o in self.source.stored(weight)] if before else weight.sources)
        elif fmt is not None:
            fed_back = bool(self.training) or (decision is not None and decision.method is not None)
            refitted = decision is not None and refits(decision.method)
            self._quantized(weight, twin, fmt, largest_relmse(fmt, fed_back, self.max_relmse, refitted))

    def _moved(self, weight: Weight, twin: Weight) -> None:
        """A kept weight that was trained: of the same shape, and finite."""
        self.result.kept += 1
        if twin.shape != weight.shape:
            self.result.problems.append(f"{weight.name} is {list(twin.shape)}, but {list(weight.shape)} in the source")
        elif not np.isfinite(self.ours.read(self.left, twin).astype(np.float32)).all():
            self.result.problems.append(f"{weight.name} holds a NaN or an infinity")

    def respelled(self, weight: Weight, output: OutputTensor) -> None:
        """A scale of activations, which may have become its reciprocal."""
        before, after = self.right.read(weight.name).astype(np.float32), self.left.read(output.name)
        wanted = np.float32(1) / before if output.part == "reciprocal" else before
        if after.size != 1 or after.reshape(-1) != wanted.reshape(-1):
            self.result.problems.append(f"{output.name} is not what {weight.name} of the source says")

    def _kept(self, weight: Weight, names: Iterable[str]) -> None:
        self.result.kept += 1
        problems, smoothing = self.result.problems, self.smoothings.get(weight.name)
        for name in names:
            a, b = self.ours.inventory.tensors.get(name), self.source.inventory.tensors[name]
            if a is None:
                problems.append(f"{name} of the source is missing")
            elif (a.dtype, a.shape) != (b.dtype, b.shape):
                problems.append(f"{name} is {a.dtype} {list(a.shape)}, but {b.dtype} {list(b.shape)} in the source")
            elif smoothing is not None:
                if not self._equals(weight, name, smoothing):
                    problems.append(f"{name} is not what the source gives with the scales in {SMOOTHING_FILE}")
            elif any(x != y for x, y in zip(_chunks(self.left, name), _chunks(self.right, name), strict=True)):
                problems.append(f"{name} was to be kept, but its bytes differ from the source")
            elif b.dtype in FLOATS and not _finite(_chunks(self.left, name), b.dtype):
                problems.append(f"{name} holds a NaN or an infinity")

    def _spelled(self, weight: Weight, twin: Weight) -> bool:
        """Whether either side spells an unquantized weight otherwise than a plain checkpoint."""
        return self.ours.tensors_of(twin) != list(twin.sources) or self.source.tensors_of(weight) != list(
            weight.sources
        )

    def _same(self, weight: Weight, twin: Weight) -> None:
        """A kept weight in another spelling: the same values."""
        self.result.kept += 1
        problems = self.result.problems
        for first, stop in _slices(twin):
            ours = self.ours.read(self.left, twin, first, stop).astype(np.float32)
            dense = self.source.read(self.right, weight, first, stop)
            if weight.name in self.smoothings:
                wide = dense.astype(np.float32) if dense.dtype.itemsize > 4 else dense
                dense = self.smoothings[weight.name].apply_rounded(wide, first)
            if ours.shape != dense.shape or not np.array_equal(ours, dense.astype(np.float32)):
                problems.append(f"{weight.name} was to be kept, but its values differ from the source")
                return
            if not np.isfinite(ours).all():
                problems.append(f"{weight.name} holds a NaN or an infinity")
                return

    def _equals(self, weight: Weight, name: str, smoothing: Smoothing) -> bool:
        """Whether a kept tensor is, bit for bit, that of the source after smoothing."""
        parts = resmoothed(self.source, self.right, weight, smoothing, SLICE_BYTES, {name})
        return all(self.left.read(name, i, i + len(part)).tobytes() == part.tobytes() for _, i, part in parts)

    def _quantized(self, weight: Weight, twin: Weight, fmt: Format, max_relmse: float) -> None:
        self.result.quantized += 1
        problems = self.result.problems
        before = self.source.formats.get(weight.name)
        whole = TensorError(weight.name, weight.role, fmt.name, 0, source=before.name if before else "")
        self.result.errors.append(whole)
        for first, stop in _slices(twin):
            tensor = self.ours.read_quantized(self.left, twin, first, stop)
            dense = self.source.read(self.right, weight, first, stop)
            if dense.shape != tensor.shape:
                problems.append(f"{weight.name} has shape {list(tensor.shape)}, but {list(dense.shape)} in the source")
                return
            if weight.name in self.smoothings:
                dense = self.smoothings[weight.name].apply(dense, first)
            part = TensorError(weight.name, weight.role, fmt.name, dense.size)
            part.add(dense, tensor)
            whole.merge(part)
            if len(twin.shape) > 2:
                self._judge(part, f"expert {first} of {weight.name}", max_relmse)
            if _vanished(dense, tensor):
                problems.append(f"{weight.name} has a zero scale on a block that is not zero in the source")
        if len(twin.shape) == 2:
            self._judge(whole, weight.name, max_relmse)
        if before and not self.training and not whole.lossless and self._claim(weight, before, fmt) == LOSSLESS:
            problems.append(f"{weight.name} has the format of the source, {fmt.name}, but other values")
        for output in self.ours.stored(twin):
            if output.constant is not None and tuple(self.left.read(output.name).reshape(-1)) != output.constant:
                problems.append(f"{output.name} does not hold {list(output.constant)}")

    def _claim(self, weight: Weight, before: Format, fmt: Format) -> str | None:
        assert self.source.dialect is not None and self.ours.dialect is not None
        return describe_transcoding(weight, before, fmt, self.source.dialect, self.ours.dialect)

    def _judge(self, error: TensorError, what: str, max_relmse: float) -> None:
        if not math.isfinite(error.squared_error):
            self.result.problems.append(f"{what} decodes to a NaN or an infinity")
        elif not error.relmse <= max_relmse:
            self.result.problems.append(
                f"{what} has a relative error of {error.relmse:.3g} against the source "
                f"(at most {max_relmse:g} is allowed)"
            )


def _dropped(decisions: dict[str, Decision], weight: Weight) -> bool:
    return weight.name in decisions and decisions[weight.name].action == "drop"


def _chunks(reader: Reader, name: str) -> Iterator[memoryview]:
    return reader.chunks(name, SLICE_BYTES)


def _finite(chunks: Iterable[memoryview], dtype: str) -> bool:
    return all(amax(np.frombuffer(chunk, numpy_dtype(dtype)))[1] for chunk in chunks)


def _slices(weight: Weight) -> Iterator[tuple[int, int]]:
    """Expert by expert, since a wrong one is lost in the error of many; a matrix in rows, whole tiles of them."""
    if len(weight.shape) < 2:
        return iter(((0, weight.shape[0] if weight.shape else 1),))
    step = 1
    if len(weight.shape) == 2:
        step = max(128, SLICE_BYTES // (2 * weight.shape[1]) // 128 * 128)
    return ((first, min(first + step, weight.shape[0])) for first in range(0, weight.shape[0], step))


def _vanished(source: NDArray[Any], tensor: QuantizedTensor) -> bool:
    fmt = tensor.format
    zero = fmt.zero_scales(tensor)
    if fmt.block[0] != 1 or not zero.any():
        return False
    blocks = to_blocks(source.reshape(-1, *source.shape[-2:]), fmt.block)
    return bool((blocks.any(axis=-1).reshape(zero.shape) & zero).any())


def _shared_scales(ours: Checkpoint, reader: Reader) -> list[str]:
    """Matrices that engines fuse must share one scale, where they have one for the whole tensor."""
    seen: dict[str, tuple[str, float]] = {}
    problems = []
    for scale in fused_scales(ours, reader):
        other, expected = seen.setdefault(scale.group, (scale.weight, scale.value))
        if scale.value != expected and other != scale.weight:
            problems.append(f"{scale.weight} and {other} are fused by engines but have different global scales")
    return problems
