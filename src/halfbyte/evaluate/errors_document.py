"""The errors document: quantized tensors against their source, per weight, per class and in total."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from halfbyte.evaluate.results import now
from halfbyte.evaluate.weight_errors import Progress, WeightError, compare_weights, finite_or_none, ratio
from halfbyte.kernels.tensor_error import TensorError
from halfbyte.models import Weight
from halfbyte.renamed import accepts_old_names
from halfbyte.source.checkpoint import Checkpoint

VERSION = 1


@accepts_old_names(workers="threads")
def tensor_errors(
    out: str | Path,
    against: str | Path,
    importance: str | Path | None = None,
    revision: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The errors document (docs/evaluation.md) of a quantized checkpoint against its source.

    ``importance``: a file that ``read_importance`` reads. Where AWQ smoothed the output's weights, the source's are
    smoothed alike before they are compared. ``threads`` threads compare slices side by side;
    ``progress`` is called with numbers of elements dealt with. CheckpointError where a quantized weight is not in the
    source or has another shape there.
    """
    pairs = compare_weights(out, against, importance, revision, threads, progress)
    errors = [error for _, error in pairs]
    ours = Checkpoint.open(out)
    by_class: dict[tuple[str, str], list[WeightError]] = {}
    for entry in errors:
        by_class.setdefault((entry.error.role, entry.error.format), []).append(entry)
    kept = [weight for weight in ours.weights if weight.name not in ours.formats]
    tensors = ours.inventory.tensors
    return {
        "halfbyte": "errors",
        "version": VERSION,
        "created": now(),
        "out": str(out),
        "against": str(against),
        "importance": Path(importance).name if importance else None,
        "weights": [_weight(w, e) for w, e in pairs],
        "classes": [_class(role, fmt, members) for (role, fmt), members in by_class.items()],
        "total": _total(errors),
        "kept": {
            "weights": len(kept),
            "parameters": sum(math.prod(w.shape) for w in kept),
            "bytes": sum(tensors[name].nbytes for w in kept for name in w.sources if name in tensors),
        },
    }


def _weight(weight: Weight, error: WeightError) -> dict[str, Any]:
    facts = {"name": weight.name, "role": weight.role, "layer": weight.layer, "format": error.error.format}
    experts = [finite_or_none(ratio(*error.experts[i])) for i in sorted(error.experts)] or None
    return {**facts, "shape": list(weight.shape), **error.as_dict(), "scales": error.histogram(), "experts": experts}


def _class(role: str, fmt: str, members: list[WeightError]) -> dict[str, Any]:
    whole = WeightError(TensorError("", role, fmt, 0))
    for member in members:
        whole.merge(member)
    return {"role": role, "format": fmt, "weights": len(members), **whole.as_dict(), "scales": whole.histogram()}


def _total(errors: list[WeightError]) -> dict[str, Any]:
    whole = WeightError(TensorError("", "", "", 0))
    for entry in errors:
        # shares of tables and scales mean nothing across formats
        counts, entry.error.codebook_blocks = entry.error.codebook_blocks, []
        whole.merge(entry)
        entry.error.codebook_blocks = counts
    return {"weights": len(errors), **whole.as_dict(), "scales": None}
