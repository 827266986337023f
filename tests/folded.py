"""Importance files for small checkpoints, with columns that differ as those of real activations do."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from halfbyte.calibration import Importance, calibration_of
from halfbyte.models.roles import bare_role, is_matrix
from halfbyte.plan.build import make_plan
from halfbyte.plan.conversion_plan import Plan
from halfbyte.recipes import Recipe
from halfbyte.source.checkpoint import Checkpoint
from small_models import linear

AWQ = linear("nvfp4", transform="awq")


def importance_of(source: Path, seed: int = 0, spread: float = 2.0) -> Importance:
    """Mean squares of all matrices but embeddings, the same for all that read one norm."""
    result = Importance({}, {})
    for weight in Checkpoint.open(source).weights:
        if not is_matrix(weight.role) or bare_role(weight.role) == "embedding" or len(weight.shape) < 2:
            continue
        columns = weight.shape[-2 if weight.transposed else -1]
        key = f"{bare_role(weight.role).endswith('down')} {weight.layer} {columns} {seed}"
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        means = np.exp(rng.normal(0, spread, columns))
        if len(weight.shape) == 3:
            means = means * np.exp(rng.normal(0, 0.5, (weight.shape[0], columns)))
        result.values[weight.name] = means.astype(np.float32)
        result.counts[weight.name] = np.full(means.shape[:-1], 100)
    return result


def plan_with(source: Path, what: Recipe = AWQ, dialect: str = "halfbyte", seed: int = 0, **more: int) -> Plan:
    """A plan of a recipe with importance."""
    checkpoint = Checkpoint.open(source)
    known = calibration_of(importance_of(source, seed), checkpoint.weights)
    return make_plan(checkpoint, what, dialect, calibration=known, **more)
