"""Files against source: every tensor accounted for, kept ones identical, quantized ones within their error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.checkpoint import Inventory, Reader, numpy_dtype
from halfbyte.dialects import OutputTensor
from halfbyte.errors import CheckpointError
from halfbyte.formats import Format, QuantizedTensor, get_format
from halfbyte.kernels import amax
from halfbyte.kernels.tensor_error import TensorError
from halfbyte.models import Weight
from halfbyte.plan.calibration_use import stored_folds
from halfbyte.plan.kv_cache import check_caches, respelled_caches
from halfbyte.plan.resources import SLICE_BYTES
from halfbyte.plan.transcoding import INPUT_SCALE, LOSSLESS, check_shape, describe_transcoding, input_scales
from halfbyte.recipes import Decision
from halfbyte.search.blocks import to_blocks
from halfbyte.source.checkpoint import FLOATS, Checkpoint
from halfbyte.source.smoothing import FOLDS, Smoothing, resmoothed
from halfbyte.verify.output_folder import decisions_of, files_beside, provenance, unfinished

MAX_RELMSE = 0.1
"""A quantized tensor further than this from its source is not the same tensor."""
MAX_RELMSE_FEEDBACK = 0.5
"""The same where rounding fed errors back: weights move for the sake of outputs then, far where tokens are few."""


@dataclass
class Verification:
    """The outcome: ``problems`` is empty when the output is complete and right.

    ``folded``: weights that are compared with the source after what was folded into them.
    """

    out: str
    source: str
    problems: list[str] = field(default_factory=list)
    kept: int = 0
    quantized: int = 0
    folded: int = 0
    dropped: dict[str, str] = field(default_factory=dict)
    errors: list[TensorError] = field(default_factory=list)

    @property
    def lossless(self) -> int:
        """How many weights that the source holds quantized have exactly its values."""
        return sum(error.lossless for error in self.errors)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def relmse(self) -> float:
        """Squared error over sum of squares, all quantized weights together."""
        squares = sum(e.squares for e in self.errors)
        return sum(e.squared_error for e in self.errors) / squares if squares else 0.0


def verify(
    out: str | Path,
    against: str | Path,
    revision: str | None = None,
    max_relmse: float = MAX_RELMSE,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Compare a converted checkpoint with its source, reading both completely.

    Problems are collected, not raised; CheckpointError or VerifyError only where a folder cannot be read at all.
    """
    result = Verification(str(out), str(against))
    folder = Path(out)
    unfinished(folder)
    ours = Checkpoint(Inventory.open(out))
    source = Checkpoint(Inventory.open(against, revision))
    result.problems += files_beside(folder, ours, source)
    if ours.dialect is None:
        result.problems.append("config.json has no quantization_config, so engines would misread the packed tensors")
        return result
    told = provenance(folder)
    decisions = decisions_of(folder, told, source)
    found = {weight.name: weight for weight in ours.weights}
    scales = input_scales(source, ours.dialect, ours.formats)
    spelled = {**scales, **respelled_caches(source, ours.dialect)}
    report = progress or (lambda _: None)
    with Reader(ours.inventory) as left, Reader(source.inventory) as right:
        smoothings = _folds(folder, told, source, right, result.problems)
        result.folded = len(smoothings)
        pair = _Pair(result, ours, source, left, right, max_relmse, smoothings)
        for weight in source.weights:
            respelled, decision = spelled.get(weight.name), decisions.get(weight.name)
            twin = found.pop(respelled.name if respelled else weight.name, None)
            if decision and decision.action == "drop":
                result.dropped[weight.name] = decision.reason
                if twin is not None:
                    result.problems.append(f"{weight.name} is there, but the recipe drops it")
            elif twin is None and weight.name in scales:
                result.dropped[weight.name] = INPUT_SCALE
            elif twin is not None and respelled:
                pair.respelled(weight, respelled)
            elif twin is None and (reason := ours.dialect.unquantized.omitted(weight)):
                result.dropped[weight.name] = reason
            elif twin is None:
                result.problems.append(f"{weight.name} of the source is missing, and no rule of the recipe drops it")
            else:
                try:
                    pair.check(weight, twin, decision)
                except CheckpointError as error:
                    result.problems.append(str(error))
            report(sum(source.inventory.tensors[n].nbytes for n in weight.sources if n in source.inventory.tensors))
        if any(decision.activations == "static" for decision in decisions.values()):
            for name in [n for n in found if n.endswith(ours.dialect.activations.endings)]:
                value = left.read(found.pop(name).name)
                if value.size != 1 or not (np.isfinite(value) & (value > 0)).all():
                    result.problems.append(f"{name}, a scale of activations, is not one positive number")
        result.problems += check_caches(told.get("recipe") or {}, ours, source, left, found)
        result.problems += [f"{name} is not in the source; it does not belong here" for name in found]
        result.problems += _shared_scales(ours, left)
    return result


@dataclass
class _Pair:
    """A converted checkpoint beside its source, both open."""

    result: Verification
    ours: Checkpoint
    source: Checkpoint
    left: Reader
    right: Reader
    max_relmse: float
    smoothings: dict[str, Smoothing]

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
            said = [f.name if f else "unquantized" for f in (fmt, wanted)]
            self.result.problems.append(f"{weight.name} is {said[0]}, but the recipe wants it {said[1]}")
        if keep and fmt is None and before is None and self._spelled(weight, twin):
            self._same(weight, twin)
        elif keep and (before is None or self.ours.dialect is self.source.dialect):
            self._kept(weight, [o.name for o in self.source.stored(weight)] if before else weight.sources)
        elif fmt is not None:
            fed_back = decision is not None and decision.method is not None and self.max_relmse == MAX_RELMSE
            self._quantized(weight, twin, fmt, MAX_RELMSE_FEEDBACK if fed_back else self.max_relmse)

    def respelled(self, weight: Weight, output: OutputTensor) -> None:
        """A scale of activations, which may have become its reciprocal."""
        before, after = self.right.read(weight.name).astype(np.float32), self.left.read(output.name)
        wanted = np.float32(1) / before if output.part == "reciprocal" else before
        if after.size != 1 or after.reshape(-1) != wanted.reshape(-1):
            self.result.problems.append(f"{output.name} is not what {weight.name} of the source says")

    def _kept(self, weight: Weight, names: Iterable[str]) -> None:
        self.result.kept += 1
        problems, fold = self.result.problems, self.smoothings.get(weight.name)
        for name in names:
            a, b = self.ours.inventory.tensors.get(name), self.source.inventory.tensors[name]
            if a is None:
                problems.append(f"{name} of the source is missing")
            elif (a.dtype, a.shape) != (b.dtype, b.shape):
                problems.append(f"{name} is {a.dtype} {list(a.shape)}, but {b.dtype} {list(b.shape)} in the source")
            elif fold is not None:
                if not self._equals(weight, name, fold):
                    problems.append(f"{name} is not what the source gives with the scales in {FOLDS}")
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

    def _equals(self, weight: Weight, name: str, fold: Smoothing) -> bool:
        """Whether a kept tensor is, bit for bit, that of the source after folding."""
        parts = resmoothed(self.source, self.right, weight, fold, SLICE_BYTES, {name})
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
        if before and not whole.lossless and self._claim(weight, before, fmt) == LOSSLESS:
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
    for weight in ours.weights:
        fmt = ours.formats.get(weight.name)
        if weight.group is None or fmt is None:
            continue
        part = "global_scale" if fmt.has_global_scale else "scales" if fmt.scale_per_matrix else None
        names = [o.name for o in ours.dialect.spelling.outputs(weight, fmt) if o.part == part] if ours.dialect else []
        if not names or names[0] not in ours.inventory.tensors:
            continue
        value = float(reader.read(names[0]).reshape(-1)[0])
        other, expected = seen.setdefault(weight.group, (weight.name, value))
        if value != expected:
            problems.append(f"{weight.name} and {other} are fused by engines but have different global scales")
    return problems


def _folds(
    folder: Path, told: dict[str, Any], source: Checkpoint, reader: Reader, problems: list[str]
) -> dict[str, Smoothing]:
    """What was folded into each weight."""
    if told.get("folds") and not (folder / FOLDS).is_file():
        problems.append(f"{FOLDS} is missing, so what was folded into the weights cannot be checked")
    try:
        return stored_folds(folder, source, reader) if told.get("folds") else {}
    except CheckpointError as error:
        problems.append(str(error))
        return {}
