"""Comparing the quantized weights of a checkpoint with their source, slice by slice; no model runs, no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.calibration import match_importance, read_importance
from halfbyte.checkpoint import Reader
from halfbyte.dialects import UnequalScalesError
from halfbyte.errors import CheckpointError, MeasurementError
from halfbyte.evaluate.results import provenance_of
from halfbyte.formats import Format, QuantizedTensor, get_format
from halfbyte.kernels import amax, backend, use_backend_here
from halfbyte.kernels.tensor_error import TensorError
from halfbyte.models import Weight
from halfbyte.plan.sealed_provenance import note_calibrated_errors
from halfbyte.plan.smoothing_use import stored_smoothings
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.smoothing import Smoothing

SLICE_BYTES = 8 << 20
Progress = Callable[[int], None]
Histogram = dict[float, int]


@dataclass
class WeightError:
    """Sums over the slices of one weight, or over the weights of a class.

    ``error`` holds what the kernels count. ``weighted`` are squared error and squares, each column times its
    importance (None without importance). ``scales`` counts blocks by the value of their stored scale.
    """

    error: TensorError
    stored: int = 0
    blocks: int = 0
    saturated_blocks: int = 0
    zero_blocks: int = 0
    top_scale_blocks: int = 0
    weighted: tuple[float, float] | None = None
    scales: Histogram = field(default_factory=dict)
    experts: dict[int, tuple[float, float]] = field(default_factory=dict)

    def merge(self, other: WeightError) -> None:
        """Add another part, or another weight of the same format."""
        self.error.merge(other.error)
        for name in ("stored", "blocks", "saturated_blocks", "zero_blocks", "top_scale_blocks"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.weighted is not None:
            before = self.weighted or (0.0, 0.0)
            self.weighted = (before[0] + other.weighted[0], before[1] + other.weighted[1])
        for value, count in other.scales.items():
            self.scales[value] = self.scales.get(value, 0) + count
        for index, (error, squares) in other.experts.items():
            self.experts[index] = (error, squares)

    def as_dict(self) -> dict[str, Any]:
        """The keys that weights, classes and the total have in common (docs/evaluation.md)."""
        e, blocks = self.error, max(self.blocks, 1)
        weighted = None if self.weighted is None else ratio(*self.weighted)
        return {
            "parameters": e.elements,
            "bytes": self.stored,
            "bits": 8 * self.stored / max(e.elements, 1),
            "relmse": finite_or_none(e.relmse),
            "sqnr_db": decibel(e.relmse),
            "weighted_relmse": finite_or_none(weighted),
            "weighted_sqnr_db": decibel(weighted),
            "calibrated_relmse": e.calibrated_relmse,
            "max_error": e.max_error,
            "blocks": self.blocks,
            "tables": self._tables(),
            "saturated_values": e.saturated / max(e.elements, 1),
            "saturated_blocks": self.saturated_blocks / blocks,
            "zero_blocks": self.zero_blocks / blocks,
            "top_scale_blocks": self.top_scale_blocks / blocks,
        }

    def histogram(self) -> dict[str, Any] | None:
        """Return the counts of ``scales`` as JSON holds them, None without any."""
        if not self.scales:
            return None
        fmt = get_format(self.error.format)
        values = sorted(self.scales)
        kind = fmt.scale.name if fmt.scale else "stored"
        return {"type": kind, "values": values, "counts": [self.scales[v] for v in values]}

    def _tables(self) -> dict[str, float]:
        fmt = get_format(self.error.format) if self.error.format else None
        if fmt is None or len(fmt.codebooks) < 2:
            return {}
        counts = self.error.codebook_blocks
        return {t.name: count / max(sum(counts), 1) for t, count in zip(fmt.codebooks, counts, strict=False)}


def compare_weights(
    out: str | Path,
    against: str | Path,
    importance: str | Path | None = None,
    revision: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[tuple[Weight, WeightError]]:
    """Every quantized weight of ``out`` with its error; the arguments are those of ``tensor_errors``."""
    ours, source = Checkpoint.open(out), Checkpoint.open(against, revision)
    twins = {weight.name: weight for weight in source.weights}
    chosen = [weight for weight in ours.weights if weight.name in ours.formats]
    if not chosen:
        raise CheckpointError(f"{out} has no quantized weight that halfbyte reads, so there are no errors to measure")
    for weight in chosen:
        if weight.name not in twins:
            raise CheckpointError(f"{weight.name} of {out} is not in {against}; is it the right source?")
    columns = {}
    if importance:
        config = source.inventory.config
        columns = match_importance(read_importance(importance), source.weights, config).values
    with Reader(ours.inventory) as left, Reader(source.inventory) as right:
        smoothings = stored_smoothings(Path(out), source, right)
        for name in columns.keys() & smoothings.keys():
            scale = smoothings[name].columns
            if scale is not None:
                columns[name] = np.asarray(columns[name] / np.square(scale), np.float32)
        job = _Job(ours, source, left, right, columns, smoothings, progress or (lambda _: None))
        with ThreadPoolExecutor(
            threads or os.cpu_count() or 1, "halfbyte-errors", use_backend_here, (backend(),)
        ) as pool:
            errors = list(job.run(pool, [(weight, twins[weight.name]) for weight in chosen]))
    note_calibrated_errors((whole.error for whole in errors), provenance_of(ours.inventory.root))
    return list(zip(chosen, errors, strict=True))


@dataclass
class _Job:
    """A checkpoint and its source, open while their weights are compared."""

    ours: Checkpoint
    source: Checkpoint
    left: Reader
    right: Reader
    importance: dict[str, NDArray[np.float32]]
    smoothings: dict[str, Smoothing]
    progress: Progress

    def run(self, pool: ThreadPoolExecutor, pairs: Iterable[tuple[Weight, Weight]]) -> Iterator[WeightError]:
        """The weights in order; slices of all of them are compared as threads become free."""
        jobs = [
            (weight, [pool.submit(self._slice, weight, twin, *cut) for cut in _cuts(weight)]) for weight, twin in pairs
        ]
        try:
            for weight, parts in jobs:
                fmt = self.ours.formats[weight.name]
                whole = WeightError(TensorError(weight.name, weight.role, fmt.name, 0))
                for part in parts:
                    whole.merge(part.result())
                names = [output.name for output in self.ours.stored(weight)]
                whole.stored = sum(self.ours.inventory.tensors[name].nbytes for name in names)
                yield whole
        finally:
            for _, parts in jobs:
                for part in parts:
                    part.cancel()

    def _slice(self, weight: Weight, twin: Weight, first: int, stop: int) -> WeightError:
        fmt = self.ours.formats[weight.name]
        dense = self.source.read(self.right, twin, first, stop)
        if twin.name in self.smoothings:
            dense = self.smoothings[twin.name].apply(dense, first)
        part = WeightError(TensorError(weight.name, weight.role, fmt.name, dense.size))
        try:
            tensor = self.ours.read_quantized(self.left, weight, first, stop)
        except UnequalScalesError:
            # projections of an expert have a global scale each: values can be compared, blocks not counted
            values = self.ours.read(self.left, weight, first, stop)
            self._values(part, weight, dense, values, first)
        else:
            if dense.shape != tensor.shape:
                raise CheckpointError(
                    f"{weight.name} has shape {list(tensor.shape)}, but {list(dense.shape)} in the source"
                )
            part.error.add(dense, tensor)
            _count_blocks(part, fmt.plain, *fmt.in_block_space(tensor, dense))
            if weight.name in self.importance:
                self._weighted(part, weight, dense, tensor.decode(), first)
        if not math.isfinite(part.error.squared_error + part.error.squares + sum(part.weighted or ())):
            raise _not_finite(weight, dense, self.source.inventory.source, self.ours.inventory.source)
        if len(weight.shape) > 2 and stop - first == 1:
            part.experts[first] = (part.error.squared_error, part.error.squares)
        self.progress(dense.size)
        return part

    def _values(self, part: WeightError, weight: Weight, dense: NDArray[Any], values: NDArray[Any], first: int) -> None:
        fmt = self.ours.formats[weight.name]
        if len(fmt.codebooks) > 1:
            part.error.codebook_blocks = [0] * len(fmt.codebooks)
        wide = dense.astype(np.float64)
        error = values - wide
        part.error.squared_error = float((error * error).sum())
        part.error.squares = float((wide * wide).sum())
        part.error.max_error = float(np.abs(error).max(initial=0))
        if weight.name in self.importance:
            self._weighted(part, weight, dense, values, first)

    def _weighted(
        self, part: WeightError, weight: Weight, dense: NDArray[Any], values: NDArray[Any], first: int
    ) -> None:
        columns = self.importance[weight.name].astype(np.float64)
        wide = dense.astype(np.float32)
        error = values - wide
        # sums over rows keep FP64 where they are long, and FP32 where they are many
        squared, squares = (np.einsum("...nk,...nk->...k", a, a).astype(np.float64) for a in (error, wide))
        weights = columns if columns.ndim == 1 else columns[first : first + len(dense)]
        part.weighted = (float((squared * weights).sum()), float((squares * weights).sum()))


def _count_blocks(part: WeightError, fmt: Format, tensor: QuantizedTensor, dense: NDArray[Any]) -> None:
    """Scales by value, and blocks that are zero, saturated, or at the end of their scales."""
    part.blocks = tensor.scales.size
    if fmt.scale is None:
        return
    if tensor.scales.dtype.itemsize == 1:
        mask = (1 << fmt.scale.bits) - 1
        counts = np.bincount(tensor.scales.reshape(-1) & np.uint8(mask), minlength=256)
        codes = np.flatnonzero(counts)
        values = fmt.split_scales(codes.astype(np.uint8))[0]
        for code, value in zip(codes.tolist(), values.tolist(), strict=True):
            part.scales[value] = part.scales.get(value, 0) + int(counts[code])
        finite = fmt.split_scales(np.arange(mask + 1, dtype=np.uint8))[0]
        top = float(np.nanmax(np.where(np.isfinite(finite), finite, 0)))
        part.zero_blocks, part.top_scale_blocks = part.scales.get(0.0, 0), part.scales.get(top, 0)
    else:
        powers, counts = np.unique(np.frexp(np.abs(tensor.scales.astype(np.float32)))[1], return_counts=True)
        part.scales = {math.ldexp(1, int(p) - 1): int(n) for p, n in zip(powers, counts, strict=True)}
        part.zero_blocks = int(np.count_nonzero(tensor.scales == 0))
    if fmt.block[0] == 1 and fmt.block[1] > 0:
        part.saturated_blocks = _saturated_blocks(fmt, tensor, dense)


def _saturated_blocks(fmt: Format, tensor: QuantizedTensor, dense: NDArray[Any]) -> int:
    """Blocks whose largest magnitude is beyond what table and scale can hold."""
    reach = fmt.block_reach(tensor)
    largest, _ = amax(dense.reshape(-1, 1, fmt.block[1]))
    return int(np.count_nonzero(largest.reshape(reach.shape) > reach))


def _not_finite(weight: Weight, dense: NDArray[Any], source: str, out: str) -> MeasurementError:
    """The refusal to give an error of a weight that holds a NaN or an infinity, in the source or in the output."""
    where = out if np.isfinite(dense.astype(np.float32)).all() else source
    return MeasurementError(f"{weight.name} of {where} holds a NaN or an infinity, so it has no error; repair it")


def _cuts(weight: Weight) -> Iterator[tuple[int, int]]:
    """Expert by expert; a matrix in rows, whole tiles of them."""
    step = 1
    if len(weight.shape) == 2:
        step = max(128, SLICE_BYTES // (2 * weight.shape[1]) // 128 * 128)
    return ((first, min(first + step, weight.shape[0])) for first in range(0, weight.shape[0], step))


def ratio(error: float, squares: float) -> float:
    """Infinite where only the source is zero."""
    return error / squares if squares else math.inf if error else 0.0


def finite_or_none(value: float | None) -> float | None:
    """Return the value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


def decibel(relmse: float | None) -> float | None:
    """SQNR: signal to quantization noise, None where there is no noise."""
    if relmse is None or not math.isfinite(relmse) or relmse <= 0:
        return None
    return -10 * math.log10(relmse)
