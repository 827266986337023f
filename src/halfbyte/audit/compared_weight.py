"""How far a weight is from its source, beside what rounding to nearest would give."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.formats import get_format
from halfbyte.kernels.tensor_error import MAX_OBJECTIVE, largest_relmse

WORSE_DB = 6.0
"""Weights this much worse than rounding to nearest were made wrongly. Rounding that follows a calibration makes this
error larger and that of the outputs smaller; where halfbyte.json notes the latter, that counts."""


@dataclass
class ComparedWeight:
    """The relative squared error of a weight on the rows that were compared, and that of rounding them to nearest.

    ``worst``: of a stack, the projection of an expert that is worst beside rounding to nearest, with ``worse_db``, how
    many dB its error lies above that (negative: below); of a matrix, the weight itself. ``moved``: halfbyte.json
    says that a calibration or a training moved the weight, so that this error says little; ``outputs`` is then the
    relative error of its outputs on the calibration text, None where none was noted.
    """

    name: str
    role: str
    format: str
    relmse: float
    nearest: float
    rows: int
    worst: str
    worse_db: float
    moved: bool = False
    outputs: float | None = None

    @property
    def is_another(self) -> bool:
        """Whether it has less in common with the source than any method leaves."""
        return not self.relmse <= largest_relmse(get_format(self.format), True, refitted=self.moved)

    @property
    def is_worse(self) -> bool:
        """Whether it was made worse than anybody can without effort."""
        if self.moved:
            return self.outputs is not None and not self.outputs <= MAX_OBJECTIVE
        return self.worse_db > WORSE_DB
