"""How many tokens a Hessian needs before it is worth more than its diagonal."""

from __future__ import annotations

import numpy as np

from halfbyte.calibration import Calibration

MIN_TOKENS = 32
"""With fewer tokens an expert's Hessian says less than its diagonal, which importance weighs."""


def enough(calibration: Calibration, weight: str) -> list[bool] | None:
    """For each expert, or for a matrix alone, whether enough tokens were seen; None where there is no Hessian."""
    tokens = calibration.tokens(weight)
    return None if tokens is None else [bool(n >= MIN_TOKENS) for n in np.atleast_1d(tokens)]
