"""How weights are cut into slices, and how much memory the work on them takes: known before a weight is read."""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from halfbyte import kernels
from halfbyte.checkpoint import nbytes
from halfbyte.formats import Format, rotation_of
from halfbyte.plan.shards import Item
from halfbyte.search.soar import working_bytes

SLICE_BYTES = 8 << 20
MEMORY = 2 << 30
# units whose slices are held between amax and encoding: one is encoded while the next one is read
RESIDENT_UNITS = 2
# Python with its libraries, and what is held of every source and output tensor
_PROCESS_BYTES = 80 << 20
_TENSOR_BYTES = 1500
# the reference encoder's FP32 copies, blocks and codes, per weight
_REFERENCE_BYTES = 20
# a Hessian in FP32, its factors in FP64 while they are found, and what is kept of them; per column squared
_HESSIAN_BYTES = 48
# targets, values, errors times H, their copies in another order and codes while rows are coupled; per weight
_REFINED_BYTES = 24
WEIGHED_BYTES = 4 << 20
"""Of rows in FP64 that are weighted by activations at a time, and their products."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Limits:
    """``threads`` that a conversion may have, and the bytes of ``memory`` that the slices in work may take.

    ``device``: where searches run that have a kernel there ("cpu" or "cuda").
    """

    threads: int = field(default_factory=cores)
    memory: int = MEMORY
    device: str = "cpu"

    @property
    def slice_bytes(self) -> int:
        """Bytes of the source that are worked on at a time."""
        return min(SLICE_BYTES, max(1 << 18, self.memory // (8 * self.threads)))

    @property
    def ahead_bytes(self) -> int:
        """Bytes of a source elsewhere that are fetched before they are asked for."""
        return self.memory // 8

    @property
    def resident_bytes(self) -> int:
        """The largest unit that stays in memory between the search for its amax and its encoding."""
        return self.memory // 8


class Resources(NamedTuple):
    """``threads`` that a conversion has, and all ``memory`` of its process at the peak, in bytes.

    There are fewer threads than allowed where their slices would not fit into the memory: an expert of a stack is
    not cut. One thread there always is, also where its slice is larger than the memory allowed.
    """

    threads: int
    memory: int


def item_bytes(item: Item) -> int:
    """Bytes of a weight in the source, or of those of its experts that the outputs hold."""
    return nbytes(item.weight.dtype, (item.parameters,))


def cuts(item: Item, whole: int, limit: int) -> list[tuple[int, int]]:
    """Ranges of leading indices of at most ``limit`` bytes of BF16 where that is possible; rows in multiples of
    ``whole`` for a matrix, and all of one whose rows take each other's errors."""
    weight, todo = item.weight, item.indices
    step = max(1, limit // max(nbytes("BF16", weight.shape[1:]), 1))
    if len(weight.shape) == 2 and item.method is not None and item.method.output:
        return [(todo.start, todo.stop)]  # every row takes the errors of others
    if len(weight.shape) == 2:
        step = max(whole, step // whole * whole)
    return [(i, min(i + step, todo.stop)) for i in range(todo.start, todo.stop, step)]


def whole_rows(fmt: Format | None) -> int:
    """Rows of a matrix that stay together: those of a tile, and those of packed zero points."""
    return 1 if fmt is None else max(fmt.block[0], 8)


def shares_amax(unit: Sequence[Item]) -> bool:
    """Whether the unit's matrices have one scale, so that all are looked at before any is encoded."""
    fmt = unit[0].format
    return len(unit[0].weight.shape) <= 2 and fmt is not None and fmt.shares_scale


def need(item: Item, count: int, quantized: bool, smoothed: bool = False) -> int:
    """Bytes of memory for the work on ``count`` leading indices; ``quantized``: the source holds codes; ``smoothed``:
    the weight is scaled in FP32.

    The slice as it is read, FP32 where it has to be converted, the codes and scales, and these as they are packed.
    """
    if item.format is None and item.outputs[0].part == "copy":
        return min(item_bytes(item), SLICE_BYTES) * (4 if smoothed else 1)
    weight = item.weight
    elements = count * math.prod(weight.shape[1:])
    wide = 4 * elements
    total = nbytes(weight.dtype, (elements,)) * (2 if weight.transposed else 1)
    total += wide if weight.dtype == "F64" else 0
    total += 2 * wide if quantized else wide if smoothed else 0
    if rotation_of(item.format):
        total += wide
    if item.format is not None and not kernels.supports(item.format):
        total += _REFERENCE_BYTES * elements
    if item.fitted:
        total += working_bytes(weight.shape[-1])
    if item.method is not None:
        total += _HESSIAN_BYTES * weight.shape[-1] ** 2
        if item.method.output:
            total += _HESSIAN_BYTES * weight.shape[-2] ** 2
        if item.method.output or item.method.refine:
            total += _REFINED_BYTES * math.prod(weight.shape[-2:])
    if item.calibrated:
        total += wide + 2 * WEIGHED_BYTES
    return total + 2 * item.nbytes * count // max(len(item.indices), 1)


def find_resources(
    units: Iterable[Sequence[Item]],
    quantized: Container[str],
    tensors: int,
    limits: Limits,
    smoothed: Container[str] = (),
) -> Resources:
    """What the work on these units takes; ``quantized``: names of weights that the source has as codes;
    ``smoothed``: of those that are scaled; ``tensors``: of source and output together."""

    def one(item: Item, count: int) -> int:
        return need(item, count, item.weight.name in quantized, item.weight.name in smoothed)

    needs = [0]
    resident: list[int] = []
    for unit in units:
        size = sum(map(item_bytes, unit))
        if size <= limits.slice_bytes:
            needs.append(sum(one(i, len(i.indices)) for i in unit if i.weight.shape))
            continue
        for item in unit:
            first, stop = cuts(item, whole_rows(item.format), limits.slice_bytes)[0]
            needs.append(one(item, stop - first))
        if unit[0].format is not None and shares_amax(unit) and size <= limits.resident_bytes:
            resident.append(size * (2 if unit[0].weight.name in smoothed else 1))
    held = sum(heapq.nlargest(RESIDENT_UNITS, resident))
    largest = max(needs)
    threads = max(1, min(limits.threads, (limits.memory - held) // max(largest, 1)))
    return Resources(threads, _PROCESS_BYTES + _TENSOR_BYTES * tensors + threads * largest + held)
