"""Targets of rounding: weights refitted to the inputs, and to the error of the residual stream, that rounding left.

x are the inputs of a weight in the source, x̂ those that the layers before it produce once they are quantized. With
Ĥ = sum of x̂ x̂ᵀ and λ a share of its mean diagonal, a weight that reads a norm aims at

    W* = W + W [sum of (x - x̂) x̂ᵀ] (Ĥ + λI)⁻¹,

so that it gives for x̂ what W gave for x (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). One that writes a times
its output to the residual stream, which lacks ρ behind it, aims at

    W* = W + [sum of a ρ x̂ᵀ] (sum of a² x̂ x̂ᵀ + λI)⁻¹.

With λ → ∞ both are W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

DAMPING = 0.05
"""λ relative to the mean of the diagonal."""
EXPERT_DAMPING = 0.5
"""Added to that for experts, times their columns over their tokens."""


@dataclass
class InputSums:
    """Sums over the inputs of a weight: ``hessian`` FP32 [K, K], ``cross`` FP32 [K, K] or [N, K], and what else
    statistics hold."""

    hessian: torch.Tensor
    cross: torch.Tensor | None
    count: int = 0
    weight: float = 0.0
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    amax: float = 0.0

    @classmethod
    def zeros(cls, columns: int, rows: int | None, device: torch.device) -> InputSums:
        """Nothing summed yet; ``rows`` of the cross products, None: without."""
        cross = None if rows is None else torch.zeros(rows, columns, device=device)
        squares = torch.zeros(columns, dtype=torch.float64, device=device)
        return cls(torch.zeros(columns, columns, device=device), cross, squares=squares)

    def add(self, x: torch.Tensor, other: torch.Tensor | None, factor: torch.Tensor | None = None) -> None:
        """Count inputs x̂ [T, K], and x - x̂ [T, K] or ρ [T, N] beside them; ``factor`` [T] multiplies outputs."""
        if not len(x):
            return
        self.count += len(x)
        self.squares += x.square().sum(0, dtype=torch.float64)
        self.amax = max(self.amax, float(x.abs().amax()))
        scaled = x if factor is None else x * factor[:, None]
        self.weight += float(len(x)) if factor is None else float(factor.square().sum(dtype=torch.float64))
        self.hessian += scaled.T @ scaled
        if self.cross is not None and other is not None:
            self.cross += other.T @ scaled

    @property
    def finite(self) -> bool:
        """Whether every sum is a finite number."""
        sums = (self.hessian, self.squares, *([] if self.cross is None else [self.cross]))
        return all(bool(torch.isfinite(values).all()) for values in sums)

    def mean(self) -> NDArray[np.float32]:
        """Mean of x̂ x̂ᵀ, FP32 [K, K]."""
        return np.asarray((self.hessian / max(self.weight, 1e-30)).cpu().numpy())

    def correction(self, expert: bool) -> torch.Tensor | None:
        """The cross products times (Ĥ + λI)⁻¹, FP64; None where no input was seen."""
        h = self.hessian.double()
        columns = len(h)
        mean = float(h.diagonal().mean())
        if self.cross is None or mean <= 0 or not self.count:
            return None
        share = DAMPING + (EXPERT_DAMPING * columns / self.count if expert else 0.0)
        damped = (h + h.T) / 2
        damped.diagonal().add_(share * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):  # FP32 sums of nearly equal inputs
            damped.diagonal().add_(share * mean * 10)
            factor = torch.linalg.cholesky(damped)
        return torch.cholesky_solve(self.cross.double().T, factor).T


def chunks(count: int, size: int) -> Iterator[slice]:
    """Rows 0..count in pieces."""
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def objective(
    error: NDArray[np.float32], target: NDArray[np.float32], hessian: NDArray[np.float32], rows: int = 1024
) -> tuple[float, float]:
    """Return tr(E H Eᵀ) and tr(W* H W*ᵀ) for an error and a target [N, K]; of many rows some, evenly spaced."""
    stride = -(-len(error) // rows)
    h = hessian.astype(np.float64)
    energies = [
        stride * float(((part := values[::stride].astype(np.float64)) @ h * part).sum()) for values in (error, target)
    ]
    return max(energies[0], 0.0), max(energies[1], 0.0)


def total(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The sums of both numbers."""
    error = squares = 0.0
    for one, other in pairs:
        error, squares = error + one, squares + other
    return error, squares
