"""What a verification found."""

from __future__ import annotations

from dataclasses import dataclass, field

from halfbyte.kernels.tensor_error import TensorError
from halfbyte.verify.checksums import Checksums


@dataclass
class Verification:
    """The outcome: ``problems`` is empty when the output is complete and right.

    ``source`` is None where only the output's own checksums were checked. ``smoothed``: weights that are compared with
    the source after smoothing. ``recomputed``: the output has no checksums, and every quantized
    weight was compared with what its recorded recipe gives. ``wrong_source``: what there is to say where it was made
    from another source.
    """

    out: str
    source: str | None
    problems: list[str] = field(default_factory=list)
    kept: int = 0
    quantized: int = 0
    smoothed: int = 0
    dropped: dict[str, str] = field(default_factory=dict)
    errors: list[TensorError] = field(default_factory=list)
    checksums: Checksums = field(default_factory=Checksums)
    recomputed: bool = False
    wrong_source: str = ""

    @property
    def lossless(self) -> int:
        """How many weights that the source holds quantized have exactly its values."""
        return sum(error.lossless for error in self.errors)

    @property
    def rounded(self) -> int:
        """How many have its codes and block scales, and a global scale that another dialect rounds."""
        return sum(error.rounded for error in self.errors)

    @property
    def ok(self) -> bool:
        """Return whether the verification found no problem."""
        return not self.problems

    @property
    def relmse(self) -> float:
        """Squared error over sum of squares, all quantized weights together."""
        squares = sum(e.squares for e in self.errors)
        return sum(e.squared_error for e in self.errors) / squares if squares else 0.0
