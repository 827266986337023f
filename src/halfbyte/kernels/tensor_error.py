"""The error of a quantized weight against its source, counted slice by slice."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import Format, QuantizedTensor
from halfbyte.kernels import ErrorStats, compare

MAX_RELMSE = 0.1
"""A quantized tensor further than this from its source is not the same tensor."""
MAX_RELMSE_FEEDBACK = 0.5
"""The same where rounding fed errors back: weights move for the sake of outputs then, far where tokens are few."""
MAX_RELMSE_REFITTED = 16.0
"""The same where weights were refitted first: what they do to inputs that never come is free then."""
MAX_OBJECTIVE = 0.25
"""The largest error of outputs that is allowed to these instead, relative to those of what they were refitted to."""
# formats with so few bits are further from heavy-tailed weights (0.33 and 0.09 at most in groups of 128)
_COARSE = {2: 0.5, 3: 0.25}


def largest_relmse(fmt: Format, fed_back: bool, stated: float = MAX_RELMSE, refitted: bool = False) -> float:
    """The largest relative error that a weight in a format may have; ``stated`` other than the default counts for all.

    ``fed_back``: GPTQ rounded it; ``refitted``: and what it rounded was not the weight itself.
    """
    if stated != MAX_RELMSE:
        return stated
    if refitted:
        return MAX_RELMSE_REFITTED
    return max(MAX_RELMSE_FEEDBACK if fed_back else MAX_RELMSE, _COARSE.get(fmt.bits, 0))


@dataclass
class TensorError:
    """Error of one quantized weight against its source; sums are over all its elements.

    ``source``: the format that the source has it in, "" where it is not quantized there. Of such a weight a
    conversion counts the elements that it ``requantized``; what it carried over unchanged adds to no sum.
    ``max_relative``: the largest change, relative to it, of a value that a carried tensor's scales can make.
    ``calibrated_error`` and ``calibrated_squares`` are weighted by activations (``halfbyte.convert.calibrated_error``),
    zeros where no calibration weighs errors.
    ``worst_relmse`` and ``worst_expert``: of a stack, the expert whose own relative error is the largest.
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
    worst_relmse: float = 0.0
    worst_expert: int = -1

    @property
    def lossless(self) -> bool:
        """Whether every value of a quantized source stayed the same."""
        return bool(self.source) and self.max_error == 0

    @property
    def rounded(self) -> bool:
        """Whether codes and block scales of a quantized source stayed the same, and its global scale was rounded.

        Another code changes a value by far more than the two roundings of FP32 that are allowed here.
        """
        return self.source == self.format and self.max_error > 0 and self.relmse <= 2.0**-44

    @property
    def relmse(self) -> float:
        """Squared error over the sum of squares; infinite where only the source is zero."""
        return _ratio(self.squared_error, self.squares)

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

    def count_expert(self, expert: int, stats: ErrorStats) -> None:
        """Count one expert of a stack, whose error may be lost in that of many."""
        self.count(stats)
        self._compare_worst(_ratio(stats.squared_error, stats.squares), expert)

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
        self._compare_worst(other.worst_relmse, other.worst_expert)
        if other.codebook_blocks:
            self._count(other.codebook_blocks)

    def _compare_worst(self, relmse: float, expert: int) -> None:
        # not "greater", which a NaN never is
        if not relmse <= self.worst_relmse:
            self.worst_relmse, self.worst_expert = relmse, expert

    def _count(self, blocks: list[int]) -> None:
        self.codebook_blocks = [a + b for a, b in zip(self.codebook_blocks or [0] * len(blocks), blocks, strict=True)]


def calibrated_relmse(errors: Iterable[TensorError]) -> float | None:
    """Relative error of several weights together, weighted by activations; None where none of them is calibrated."""
    members = [error for error in errors if error.calibrated_squares]
    squares = sum(error.calibrated_squares for error in members)
    return sum(error.calibrated_error for error in members) / squares if members else None


def _ratio(squared_error: float, squares: float) -> float:
    if not squares:
        return math.inf if squared_error else 0.0
    return squared_error / squares


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
