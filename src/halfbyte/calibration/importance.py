"""Importance: how large the activations are that meet each input column of a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from halfbyte.calibration.gguf_names import gguf_names, gguf_targets, head_order
from halfbyte.errors import CheckpointError
from halfbyte.models import Weight
from halfbyte.models.roles import bare_role, is_matrix

Floats = NDArray[np.float32]
Counts = NDArray[np.int64]
MAX_IMPORTANCE_BYTES = 1 << 32
"""Models of a trillion parameters have importance of about a GB."""


@dataclass
class Importance:
    """Mean squared activation per input column, by tensor name.

    ``values`` FP32 [K], or [E, K] for stacked experts (llama.cpp's legacy files keep a stack flat, [E*K]).
    ``counts`` int64 [] or [E]: how many tokens (legacy files: calls) were averaged; 0 means no data.
    ``spelling`` says whether names are a checkpoint's or llama.cpp's. ``datasets`` and ``chunks`` are notes.
    """

    values: dict[str, Floats]
    counts: dict[str, Counts]
    spelling: Literal["checkpoint", "gguf"] = "checkpoint"
    datasets: tuple[str, ...] = ()
    chunks: int = 0


@dataclass
class Matched:
    """Importance by weight.

    ``values`` [K] or [E, K] and ``counts`` [] or [E] by weight name. ``unmatched`` are entries that fit no weight,
    ``uncovered`` matrices without importance, ``no_data`` the experts that no token reached: their importance
    is one constant, so they are quantized by plain squared error.
    """

    values: dict[str, Floats] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    uncovered: list[str] = field(default_factory=list)
    no_data: dict[str, list[int]] = field(default_factory=dict)


def add_entry(into: Importance, name: str, means: NDArray[Any], counts: NDArray[Any], file: str) -> None:
    """Check one entry and add it; for readers of importance files."""
    if name in into.values:
        raise CheckpointError(f"{file} holds {name} twice")
    if not np.isfinite(means).all() or (means < 0).any() or (counts < 0).any():
        raise CheckpointError(f"{name} in {file} holds a value that is negative or not finite; the file is damaged")
    into.values[name] = np.ascontiguousarray(means, dtype=np.float32)
    into.counts[name] = np.asarray(counts, dtype=np.int64)


def match_importance(
    importance: Importance, weights: Sequence[Weight], config: Mapping[str, Any] | None = None
) -> Matched:
    """Give every entry to its weights: by role and layer for llama.cpp's names, by name for halfbyte's.

    ``config`` is the model's config.json, which says where llama.cpp orders columns otherwise. Several entries for one
    weight (gate and up of fused experts) are merged by maximum. CheckpointError, with both sizes, where an entry has
    another number of columns than its weight: it is of another model.
    """
    by_name = {w.name: w for w in weights}
    targets = gguf_targets(importance.values, weights) if importance.spelling == "gguf" else {}
    result = Matched()
    for name, values in importance.values.items():
        target = targets.get(name) if importance.spelling == "gguf" else by_name.get(name)
        if target is None:
            result.unmatched.append(name)
            continue
        shaped, counts = _fit(name, values, importance.counts[name], target)
        order = head_order(target, config or {}) if importance.spelling == "gguf" else None
        if order is not None:
            shaped = np.ascontiguousarray(shaped[..., order])
        if target.name in result.values:
            old, tokens = result.values[target.name], result.counts[target.name]
            if old.shape != shaped.shape:
                raise CheckpointError(f"{name} and another entry for {target.name} have different shapes")
            # the same input seen from two projections: equal, but for rounding
            shaped, counts = np.maximum(old, shaped), np.maximum(tokens, counts)
        result.values[target.name], result.counts[target.name] = shaped, counts
    for name in list(result.values):
        _fill(result, name)
    wanted = (w for w in weights if is_matrix(w.role) and bare_role(w.role) != "embedding" and len(w.shape) > 1)
    result.uncovered = [w.name for w in wanted if w.name not in result.values]
    return result


def spelled_for_llama(importance: Importance, weights: Sequence[Weight], config: Mapping[str, Any]) -> Importance:
    """Importance by the checkpoint's names under those that the model's tensors have in GGUF files.

    Inputs that several of them share, such as those of gate and up of fused experts, stand under each name.
    CheckpointError where no name of llama.cpp is known for any of it.
    """
    by_name = {w.name: w for w in weights}
    result = Importance({}, {}, "gguf", importance.datasets, importance.chunks)
    for name, target in gguf_names(weights).items():
        if target in importance.values:
            values, order = importance.values[target], head_order(by_name[target], config)
            if order is not None:
                values = values[..., np.argsort(order)]
            result.values[name] = np.ascontiguousarray(values)
            result.counts[name] = importance.counts[target]
    if not result.values:
        raise CheckpointError("llama.cpp has no names for the weights of this model that halfbyte knows of")
    return result


def _fit(name: str, values: Floats, counts: Counts, weight: Weight) -> tuple[Floats, Counts]:
    """An entry in the shape that its weight needs."""
    columns = weight.shape[-2 if weight.transposed else -1] if len(weight.shape) > 1 else 0
    experts = weight.shape[0] if len(weight.shape) == 3 else None
    if values.shape == (columns,) or (experts is not None and values.shape == (experts, columns)):
        return values, counts
    if experts is not None and values.shape == (experts * columns,):
        # legacy files count a stack as a whole; an expert that no token reached has sums of zero
        shaped = values.reshape(experts, columns)
        return shaped, np.where(shaped.any(axis=1), counts, 0)
    wanted = f"[{columns}]" + (f" or [{experts}, {columns}]" if experts is not None else "")
    raise CheckpointError(
        f"the importance {name} has shape {list(values.shape)}, but {weight.name} needs {wanted}; "
        "the file was made for another model"
    )


def _fill(result: Matched, name: str) -> None:
    """A constant where no token came by; no importance at all where none ever did."""
    values, counts = result.values[name], result.counts[name]
    reached = counts > 0
    if not reached.any() or not values.any():
        del result.values[name], result.counts[name]
        if counts.ndim:
            result.no_data[name] = list(range(len(counts)))
        return
    if counts.ndim and not reached.all():
        values = values.copy()
        values[~reached] = values[reached].mean()
        result.values[name] = values
        result.no_data[name] = np.flatnonzero(~reached).tolist()
