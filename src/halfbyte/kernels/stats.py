"""Error of quantized values against their source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.formats import QuantizedTensor


@dataclass
class ErrorStats:
    """Sums over all elements that were added: sum of squared errors, of squares, and the largest error.

    ``saturated`` counts elements outside the range of values that their block can stand for; ``codebook_blocks`` the
    blocks that chose each codebook. Sums are FP64; they do not depend on the instruction set of the kernels.
    """

    elements: int = 0
    squared_error: float = 0.0
    squares: float = 0.0
    max_error: float = 0.0
    saturated: int = 0
    codebook_blocks: list[int] = field(default_factory=list)

    @property
    def relmse(self) -> float:
        """Squared error over the sum of squares."""
        return self.squared_error / self.squares if self.squares else 0.0

    def add(self, other: ErrorStats) -> None:
        """Count what another has counted."""
        self.elements += other.elements
        self.squared_error += other.squared_error
        self.squares += other.squares
        self.max_error = max(self.max_error, other.max_error)
        self.saturated += other.saturated
        count = max(len(self.codebook_blocks), len(other.codebook_blocks))
        ours, theirs = ([*b.codebook_blocks, *[0] * (count - len(b.codebook_blocks))] for b in (self, other))
        self.codebook_blocks = [a + b for a, b in zip(ours, theirs, strict=True)]


def codebook_count(tensor: QuantizedTensor) -> int:
    """How many codebooks the blocks of this format choose from."""
    return max(1, len(tensor.format.codebooks))


def reference_stats(tensor: QuantizedTensor, source: NDArray[Any]) -> ErrorStats:
    """The statistics by NumPy, in FP64."""
    wide = source.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        error = (tensor.format.decode(tensor) - wide).astype(np.float64)
        ends = tensor.format.value_range(tensor)
    low, high = np.minimum(*ends), np.maximum(*ends)
    return ErrorStats(
        wide.size,
        float(np.sum(error * error)),
        float(np.sum(wide.astype(np.float64) ** 2)),
        float(np.abs(error).max(initial=0)),
        int(np.count_nonzero((wide < low) | (wide > high))),
        np.bincount(tensor.codebooks.ravel(), minlength=codebook_count(tensor)).tolist(),
    )
