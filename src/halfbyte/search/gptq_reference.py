"""The NumPy reference of rounding with error feedback: the definition that the compiled code equals bit for bit.

Order of operations, all in FP32. y = x * (1 / global scale). Columns are rounded in the order of the arrays. Before a
block, each of its columns j becomes y_j - d_i * F_ij for all earlier columns i in turn; within the block likewise.
A column's value is nearest(y * (1 / scale)) * scale, its error d = y - value. A candidate's loss is the sum of
(u * u) * gain over the block, u = d * p, where p is the power of two above the first candidate's scale; without
feedback u = (e_j + e_i * V_ij for all i < j in turn) * p with the errors e of nearest rounding. The first least
loss wins; a single candidate is not judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import Format, QuantizedTensor
from halfbyte.formats.arrays import Codes, Floats
from halfbyte.formats.scale_search import ColumnChoice
from halfbyte.search.searches import Search


@dataclass(frozen=True)
class Rounding:
    """The arrays that steer a rounding, over columns in the order in which they are rounded.

    ``inner`` FP32 [K/B, B, B] (row j: coefficients of the errors of the block's columns 0..j-1) and ``outer`` FP32
    [K/16, K, 16] (of all columns, for 16 columns each) are the feedback; None: none. Candidates are judged by
    ``judge`` [K/B, B, B] and ``gain`` [K], with feedback or without. ``block_of`` int32 [K] names the block whose
    given scale a column has (then B is 16 in ``inner`` and nothing is judged); None: scales are chosen.
    """

    gain: Floats
    judge: Floats | None = None
    judge_feedback: bool = False
    inner: Floats | None = None
    outer: Floats | None = None
    block_of: NDArray[np.int32] | None = None


def round_reference(x: Floats, out: QuantizedTensor, search: Search, how: Rounding, codes: Codes) -> None:
    """Round x [L, N, K] into unpacked ``codes`` [L, N, K] and the scales and offsets of ``out``."""
    rows = Rows.of(x.reshape(-1, x.shape[-1]), out, codes.reshape(-1, x.shape[-1]))
    if out.global_scale is not None:
        np.multiply(rows.y, np.repeat(np.float32(1) / out.global_scale.reshape(-1), x.shape[1]), out=rows.y)
    for start in range(0, len(rows.y), rows.size(how)):
        rows.compensate(start, how)
        rows.round_block(start, search, how)


@dataclass(frozen=True)
class Rows:
    """Rows while they are rounded: ``y``, ``error`` and ``values`` FP32 [K, rows]; ``part`` shows some rows."""

    format: Format
    y: Floats
    error: Floats
    values: Floats
    codes: Codes
    scales: NDArray[Any]
    offsets: NDArray[Any] | None

    @classmethod
    def of(cls, x: Floats, out: QuantizedTensor, codes: Codes) -> Rows:
        """Rows x [N, K], which are copied, and where their results go."""
        y = x.T.copy()
        offsets = None if out.offsets is None else out.offsets.reshape(len(x), -1)
        return cls(out.format, y, np.zeros_like(y), np.zeros_like(y), codes, out.scales.reshape(len(x), -1), offsets)

    def part(self, rows: slice) -> Rows:
        """Views of some rows."""
        offsets = None if self.offsets is None else self.offsets[rows]
        y, error, values = self.y[:, rows], self.error[:, rows], self.values[:, rows]
        return Rows(self.format, y, error, values, self.codes[rows], self.scales[rows], offsets)

    def size(self, how: Rounding) -> int:
        """Columns that are worked on together."""
        return self.format.block[1] if how.block_of is None else 16

    def compensate(self, start: int, how: Rounding) -> None:
        """Take from the columns of a block what the errors of all earlier blocks ask for."""
        size = self.size(how)
        for i in range(start) if how.outer is not None else ():
            assert how.outer is not None
            coefficients = how.outer[start // 16 : (start + size) // 16, i].reshape(-1)
            self.y[start : start + size] -= self.error[i] * coefficients[:, None]

    def round_block(self, start: int, search: Search, how: Rounding) -> None:
        """Choose the scales of a block where they are not given, and round its columns."""
        size, fmt = self.size(how), self.format
        block = start // size
        if how.block_of is None:
            choice = _choose(self.y[start : start + size], fmt, search, how, block)
            self.scales[:, block] = choice.stored
            if self.offsets is not None:
                self.offsets[:, block] = choice.offset
        inner = None if how.inner is None else how.inner[block]
        for j in range(start, start + size):
            if how.block_of is not None:
                b = int(how.block_of[j])
                choice = fmt.stored_choice(self.scales[:, b], None if self.offsets is None else self.offsets[:, b])
            v = self.y[j]
            for i in range(start, j) if inner is not None else ():
                assert inner is not None
                v = v - self.error[i] * inner[j - start, i - start]
            self.codes[:, j], value = fmt.round_column(v, choice)
            self.values[j], self.error[j] = value, v - value


def _choose(y: Floats, fmt: Format, search: Search, how: Rounding, block: int) -> ColumnChoice:
    """The scale and codebook of least loss for blocks y [B, rows]."""
    best: ColumnChoice | None = None
    loss = np.zeros(y.shape[1], dtype=np.float32)
    unit = None
    for choice, judged in fmt.column_choices(y, search):
        if unit is None:
            unit = fmt.column_unit(y, choice)
        new_loss = _loss(y, fmt, choice, unit, how, block) if judged else np.zeros_like(loss)
        if best is None:
            best, loss = choice, new_loss
            continue
        better = new_loss < loss
        loss = np.where(better, new_loss, loss)
        for name in ("stored", "scale", "offset", "codebook"):
            setattr(best, name, np.where(better, getattr(choice, name), getattr(best, name)))
    assert best is not None
    return fmt.settled_choice(best, y)


def _loss(y: Floats, fmt: Format, choice: ColumnChoice, unit: Floats, how: Rounding, block: int) -> Floats:
    size = len(y)
    coefficients = None if how.judge is None else how.judge[block]
    errors: list[Floats] = []
    total = np.zeros(y.shape[1], dtype=np.float32)
    for j in range(size):
        v = y[j]
        if how.judge_feedback and coefficients is not None:
            for i in range(j):
                v = v - errors[i] * coefficients[j, i]
        v = v - fmt.round_column(v, choice)[1]
        errors.append(v)
        if not how.judge_feedback and coefficients is not None:
            for i in range(j):
                v = v + errors[i] * coefficients[j, i]
        u = v * unit
        total = total + u * u * how.gain[block * size + j]
    return total
