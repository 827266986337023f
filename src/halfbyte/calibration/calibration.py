"""What is known of the activations that meet a checkpoint's weights, and the part of it that a slice needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.calibration.importance import Floats, Importance, Matched, match_importance
from halfbyte.calibration.importance_file import read_importance
from halfbyte.calibration.model_identity import check_identity
from halfbyte.calibration.statistics import Statistics, read_description
from halfbyte.errors import PlanError
from halfbyte.formats.rotation import Swaps
from halfbyte.models import Weight
from halfbyte.search.output_metric import PreparedOutput
from halfbyte.search.prepared import Prepared
from halfbyte.source.checkpoint import Checkpoint


@dataclass(frozen=True)
class Activations:
    """What the encoder may know of the inputs of a slice of a weight.

    ``importance``: FP32 [K], or [E, K] for a slice of E experts; the largest of each row is 1. ``prepared``: what
    GPTQ or the local-Hessian search was given, one for a matrix or one for each expert, None for experts that too few
    tokens reached. ``outputs``: the same of the gradients at the outputs, for row feedback. ``rotation``: steps of a
    rotation that was found from the inputs.
    """

    importance: Floats | None = None
    prepared: Sequence[Prepared | None] | None = None
    rotation: Swaps | None = None
    outputs: Sequence[PreparedOutput | None] | None = None


@dataclass(frozen=True)
class Calibration:
    """What is known of a checkpoint's activations: an importance file, or the statistics of a calibration.

    ``name`` and ``digest`` (sha256 of its content, hex) say which it was, ``entries`` how many weights it knows;
    ``statistics`` holds Hessians, where they were collected.
    """

    name: str
    digest: str
    entries: int
    matched: Matched
    statistics: Statistics | None = None
    notes: tuple[str, ...] = ()

    def tokens(self, weight: str) -> NDArray[np.int64] | None:
        """How many tokens a weight's Hessian was summed over, [] or [E]; None where there is no Hessian."""
        sums = self.statistics.array(weight, "hessian") if self.statistics else None
        if self.statistics is None or sums is None:
            return None
        count = self.statistics.array(weight, "count")
        # experts that share one Hessian have all their tokens in it
        return count if count is None or sums.ndim > 2 else count.sum()

    def hessian(self, weight: str, expert: int | None = None, scale: Floats | None = None) -> Floats:
        """Mean of xᵀx, FP32 [K, K]; ``scale`` [K] is what the weight's columns have been multiplied by."""
        assert self.statistics is not None
        hessian = self.statistics.hessian(weight, expert)
        assert hessian is not None
        return hessian if scale is None else np.asarray(hessian / np.outer(scale, scale), dtype=np.float32)

    def output_hessian(self, weight: str, expert: int | None = None) -> Floats | None:
        """Sum of gᵀg over the gradients at the outputs, FP32 [N, N]; None where none were collected."""
        return self.statistics.output_hessian(weight, expert) if self.statistics else None

    def slice(self, weight: str, first: int, stop: int, scale: Floats | None = None) -> Activations:
        """What is known for leading indices first..stop of a stack, or for any rows of a matrix.

        ``scale`` FP32 [K] or [E, K] is what the weight's columns have been multiplied by (its inputs are
        divided by it).
        """
        values = self.matched.values[weight]
        if values.ndim > 1:
            values = values[first:stop]
        if scale is not None:
            values = np.asarray(values / np.square(scale if scale.ndim == 1 else scale[first:stop]), np.float32)
        # row by row, so that a stack gives the same bytes however it is cut
        largest = values.max(axis=-1, keepdims=True)
        return Activations(np.asarray(values / np.where(largest > 0, largest, np.float32(1)), np.float32))


def calibration_of(
    given: str | Path | Importance, weights: Sequence[Weight], config: Mapping[str, Any] | None = None
) -> Calibration:
    """Match an importance file (its path, or its content) to the weights of a checkpoint with its ``config``.

    CheckpointError for a file that cannot be read or whose sizes do not fit, PlanError if nothing in it does.
    """
    statistics = None
    if not isinstance(given, Importance) and Path(given).is_dir():
        statistics = Statistics(given)
    importance = given if isinstance(given, Importance) else read_importance(given)
    name = "" if isinstance(given, Importance) else Path(given).name
    matched = match_importance(importance, weights, config)
    if not matched.values:
        first = next(iter(importance.values), "none")
        raise PlanError(
            f"the importance file {name or '(in memory)'} fits no weight of this checkpoint (its first entry is "
            f"{first}); it was made for another model"
        )
    sha = digest(importance)
    if statistics is not None:
        sha = hashlib.sha256((sha + json.dumps(statistics.description, sort_keys=True)).encode()).hexdigest()
    return Calibration(name, sha, len(importance.values), matched, statistics)


def calibration_for(given: str | Path | Importance, checkpoint: Checkpoint, of_base: bool = False) -> Calibration:
    """``calibration_of`` for a checkpoint; PlanError for statistics of another model that is not said to be its base.

    What cannot be checked, or was waived by ``of_base``, is one of the result's ``notes``.
    """
    if not isinstance(given, Importance) and Path(given).is_dir():
        notes = check_identity(read_description(Path(given)), checkpoint, of_base)
    else:
        notes = []
    return replace(calibration_of(given, checkpoint.weights, checkpoint.inventory.config), notes=tuple(notes))


def digest(importance: Importance) -> str:
    """sha256 (hex) of names, means and counts, in any order."""
    content = hashlib.sha256(importance.spelling.encode())
    for name in sorted(importance.values):
        values, counts = importance.values[name], np.asarray(importance.counts[name])
        content.update(f"{len(name)} {name} {values.shape} {counts.shape}".encode())
        content.update(np.ascontiguousarray(values, "<f4").tobytes() + np.ascontiguousarray(counts, "<i8").tobytes())
    return content.hexdigest()
