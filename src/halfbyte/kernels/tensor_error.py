"""The error of a quantized weight against its source, counted slice by slice."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import QuantizedTensor
from halfbyte.kernels import ErrorStats, compare

MAX_RELMSE = 0.1
"""A quantized tensor further than this from its source is not the same tensor."""
MAX_RELMSE_FEEDBACK = 0.5
"""The same where rounding fed errors back: weights move for the sake of outputs then, far where tokens are few."""


@dataclass
class TensorError:
    """Error of one quantized weight against its source; sums are over all its elements.

    ``source``: the format that the source has it in, "" where it is not quantized there. Of such a weight a
    conversion counts the elements that it ``requantized``; what it carried over unchanged adds to no sum.
    ``max_relative``: the largest change, relative to it, of a value that a carried tensor's scales can make.
    ``calibrated_error`` and ``calibrated_squares`` are weighted by activations (``halfbyte.convert.calibrated_error``),
    zeros where no calibration weighs errors.
    """

    name: str
    role: str
    format: str
    elements: int
    squared_error: float = 0.0
    squares: float = 0.0
    max_error: float = 0.0
    codebook_blocks: list[int] = field(default_factory=list)
    saturated: int = 0
    source: str = ""
    requantized: int = 0
    max_relative: float = 0.0
    calibrated_error: float = 0.0
    calibrated_squares: float = 0.0

    @property
    def lossless(self) -> bool:
        """Whether every value of a quantized source stayed the same."""
        return bool(self.source) and self.max_error == 0

    @property
    def relmse(self) -> float:
        """Squared error over the sum of squares; infinite where only the source is zero."""
        if not self.squares:
            return math.inf if self.squared_error else 0.0
        return self.squared_error / self.squares

    @property
    def calibrated_relmse(self) -> float | None:
        """Squared error of outputs on the calibration text over their squares; None without a calibration."""
        return calibrated_relmse((self,))

    def add(self, source: NDArray[Any], tensor: QuantizedTensor) -> None:
        """Count the error of a slice against its source."""
        stats = ErrorStats()
        compare(tensor, source, stats)
        self.count(stats)

    def count(self, stats: ErrorStats) -> None:
        """Count a slice whose error has been measured."""
        self.squared_error += stats.squared_error
        self.squares += stats.squares
        self.max_error = max(self.max_error, stats.max_error)
        self.saturated += stats.saturated
        if len(stats.codebook_blocks) > 1:
            self._count(stats.codebook_blocks)

    def carry(self, before: QuantizedTensor, after: QuantizedTensor) -> None:
        """Count a slice with the same codes and scales, whose values may have changed by a rounding."""
        self.add(before.decode(), after)
        if self.max_error:
            self.max_relative = max(self.max_relative, _largest_change(before, after))

    def merge(self, other: TensorError) -> None:
        """Add the errors of another part of the same weight."""
        self.elements += other.elements
        self.squared_error += other.squared_error
        self.squares += other.squares
        self.max_error = max(self.max_error, other.max_error)
        self.saturated += other.saturated
        self.requantized += other.requantized
        self.max_relative = max(self.max_relative, other.max_relative)
        self.calibrated_error += other.calibrated_error
        self.calibrated_squares += other.calibrated_squares
        if other.codebook_blocks:
            self._count(other.codebook_blocks)

    def _count(self, blocks: list[int]) -> None:
        self.codebook_blocks = [a + b for a, b in zip(self.codebook_blocks or [0] * len(blocks), blocks, strict=True)]


def calibrated_relmse(errors: Iterable[TensorError]) -> float | None:
    """Relative error of several weights together, weighted by activations; None where none of them is calibrated."""
    members = [error for error in errors if error.calibrated_squares]
    squares = sum(error.calibrated_squares for error in members)
    return sum(error.calibrated_error for error in members) / squares if members else None


def _largest_change(before: QuantizedTensor, after: QuantizedTensor) -> float:
    """The largest relative change of any code's value under the scale bytes that occur."""
    fmt = before.format
    _, chosen = fmt.split_scales(np.arange(256, dtype=np.uint8))
    codebooks = np.stack([t.array for t in fmt.codebooks])[0 if chosen is None else chosen]
    values = [codebooks * fmt.scale_factors(t)[..., None] for t in (before, after)]
    lead = before.shape[:-2]
    used = np.array([np.bincount(s.ravel(), minlength=256) > 0 for s in before.scales.reshape(math.prod(lead), -1)])
    some = used.reshape(*lead, 256)[..., None] & (values[0] != 0)
    return float((np.abs(values[1] - values[0])[some] / np.abs(values[0][some])).max(initial=0))
