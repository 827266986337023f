"""``export``: a student's codes and scales through its plan's writers, as the forward pass sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from halfbyte.convert.conversion import Conversion, convert
from halfbyte.convert.given_tensors import GivenTensors
from halfbyte.errors import HalfbyteError
from halfbyte.formats import QuantizedTensor
from halfbyte.plan.conversion_plan import Plan
from halfbyte.runtime.packed import ARRAYS, rows_of
from halfbyte.train.start import Origin
from halfbyte.train.student import Student, student_of

_TYPES: dict[torch.dtype, Any] = {
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float16: np.float16,
    torch.float32: np.float32,
}


def export(
    model: Any,
    out: str | Path,
    dialect: str | None = None,
    training: Mapping[str, Any] | None = None,
    threads: int | None = None,
) -> Conversion:
    """Write a student to the folder ``out``, in its start's dialect or another one; verified by ``halfbyte.verify``.

    Codes and scales are those that its next forward pass would see: nothing is rounded a second time. All else comes
    from the start, trained kept weights excepted. ``training``: what halfbyte.json says of the method (``method``,
    ``steps``, ``tokens``, ``teacher``, ...). HalfbyteError for a model that is no student or whose weights are not
    finite, PlanError for a dialect that cannot hold a format, OutputError for an unusable folder.
    """
    student = student_of(model)
    for name, trained in student.weights.items():
        if not torch.isfinite(trained.master).all():
            raise HalfbyteError(
                f"{name} of the student is not finite, so it cannot be written; train with a lower rate"
            )
    tensors = {name: trained.final() for name, trained in student.weights.items()}
    dense = {name: _stored(kept.master, kept.stored) for name, kept in student.kept.items()}
    return write(student.origin, tensors, _by_source(student, dense), out, dialect, training, threads)


def write(
    origin: Origin,
    tensors: Mapping[str, QuantizedTensor],
    dense: Mapping[str, NDArray[Any]],
    out: str | Path,
    dialect: str | None = None,
    training: Mapping[str, Any] | None = None,
    threads: int | None = None,
) -> Conversion:
    """Write trained codes and scales by weight name, and trained kept tensors by the names in the start's files."""
    plan = origin.plan_for(dialect)
    missing = [name for name in tensors if name not in {item.weight.name for item in plan.items if item.format}]
    if missing:
        raise HalfbyteError(f"the plan for {plan.dialect.name} does not quantize {missing[0]}, which was trained")
    record = {
        **(training or {}),
        "start": plan.checkpoint.inventory.fingerprint,
        "trained": len(tensors),
        "kept_trained": sorted(dense),
        "sha256": digest(tensors, dense),
    }
    given = GivenTensors({name: partial(_slice, tensors, name) for name in tensors}, dense)
    return convert(with_training(plan, record), out, threads, given=given)


def with_training(plan: Plan, record: Mapping[str, Any]) -> Plan:
    """The plan whose halfbyte.json tells how its weights were trained."""
    return replace(plan, origin={**plan.origin, "training": dict(record)})


def digest(tensors: Mapping[str, QuantizedTensor], dense: Mapping[str, NDArray[Any]]) -> str:
    """sha256 (hex) of all trained arrays, so that an interrupted export continues only with the same ones."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        for part in ARRAYS:
            array = getattr(tensors[name], part)
            if array is not None:
                total.update(f"{name}.{part}".encode() + np.ascontiguousarray(array).tobytes())
    for name in sorted(dense):
        total.update(name.encode() + np.ascontiguousarray(dense[name]).tobytes())
    return total.hexdigest()


def _slice(tensors: Mapping[str, QuantizedTensor], name: str, first: int, stop: int) -> QuantizedTensor:
    """Experts first..stop of a stack, or rows of a matrix."""
    tensor = tensors[name]
    if len(tensor.shape) < 3:
        return tensor if (first, stop) == (0, tensor.shape[0]) else rows_of(tensor, first, stop)
    arrays = {part: getattr(tensor, part) for part in ARRAYS}
    cut = {part: array[first:stop] for part, array in arrays.items() if array is not None}
    return replace(tensor, shape=(stop - first, *tensor.shape[1:]), **cut)


def _stored(master: torch.Tensor, stored: torch.dtype) -> NDArray[Any]:
    """A trained kept weight in the type of its file."""
    return master.detach().float().cpu().numpy().astype(_TYPES[stored])


def _by_source(student: Student, dense: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Kept weights by the one tensor that holds each in the start's files."""
    checkpoint = student.origin.checkpoint
    weights = {weight.name: weight for weight in checkpoint.weights}
    named = {}
    for name, array in dense.items():
        sources = checkpoint.tensors_of(weights[name])
        if len(sources) != 1 or checkpoint.inventory.tensors[sources[0]].shape != array.shape:
            raise HalfbyteError(f"{name} lies in several tensors, so it cannot be trained; freeze it (kept norms)")
        named[sources[0]] = array
    return named
