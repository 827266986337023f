"""The error of a quantized weight against its source, counted slice by slice."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import QuantizedTensor
from halfbyte.kernels import ErrorStats, compare


@dataclass
class TensorError:
    """Error of one quantized weight against its source; sums are over all its elements.

    ``source``: the format that the source has it in, "" where it is not quantized there. Of such a weight a
    conversion counts the elements that it ``requantized``; what it carried over unchanged adds to no sum.
    ``max_relative``: the largest change of a carried value, relative to it.
    """

    name: str
    role: str
    format: str
    elements: int
    squared_error: float = 0.0
    squares: float = 0.0
    max_error: float = 0.0
    table_blocks: list[int] = field(default_factory=list)
    saturated: int = 0
    source: str = ""
    requantized: int = 0
    max_relative: float = 0.0

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

    def add(self, source: NDArray[Any], tensor: QuantizedTensor) -> None:
        """Count a slice."""
        stats = ErrorStats()
        compare(tensor, source, stats)
        self.count(stats)

    def count(self, stats: ErrorStats) -> None:
        """Count a slice whose error has been measured."""
        self.squared_error += stats.squared_error
        self.squares += stats.squares
        self.max_error = max(self.max_error, stats.max_error)
        self.saturated += stats.saturated
        if len(stats.table_blocks) > 1:
            self._count(stats.table_blocks)

    def compare(self, source: NDArray[np.float32], tensor: QuantizedTensor) -> None:
        """Count a slice that was carried over, whose values may have changed by a rounding."""
        self.add(source, tensor)
        some = source != 0
        changes = np.abs(tensor.decode()[some] - source[some]) / np.abs(source[some])
        self.max_relative = max(self.max_relative, float(changes.max(initial=0)))

    def merge(self, other: TensorError) -> None:
        """Add the errors of another part of the same weight."""
        self.elements += other.elements
        self.squared_error += other.squared_error
        self.squares += other.squares
        self.max_error = max(self.max_error, other.max_error)
        self.saturated += other.saturated
        self.requantized += other.requantized
        self.max_relative = max(self.max_relative, other.max_relative)
        self._count(other.table_blocks)

    def _count(self, blocks: list[int]) -> None:
        self.table_blocks = [a + b for a, b in zip(self.table_blocks or [0] * len(blocks), blocks, strict=True)]
