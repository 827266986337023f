"""Engines store modules: which region of a weight becomes which, and stored arrays as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from halfbyte.dialects.outputs import Array
from halfbyte.formats import Format
from halfbyte.models import Weight
from halfbyte.models.roles import bare_role

_BYTES = (np.dtype(np.int32), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu))


class Module(NamedTuple):
    """A module of the engine that a region of a weight becomes."""

    name: str
    expert: int | None
    rows: tuple[int, int, int] | None
    n: int
    k: int


def modules(weight: Weight, one_expert: bool = False) -> Iterator[Module]:
    """The modules of a weight: itself, or per expert and projection; ``one_expert``: of the first expert only."""
    n, k = weight.shape[-2:]
    if len(weight.shape) == 2:
        yield Module(weight.name.removesuffix(".weight"), None, None, n, k)
        return
    spelled = {(p.expert, p.rows): p.source.removesuffix(".weight") for p in weight.pieces if p.expert is not None}
    base, last = weight.name.rsplit(".", 1)
    parts = weight.row_parts or ((last.removesuffix("_proj"), 0, n),)
    for expert in range(1 if one_expert else weight.shape[0]):
        for i, (part, first, stop) in enumerate(parts):
            rows = (i, n, len(parts)) if weight.interleaved else (first, stop, 1)
            name = spelled.get((expert, (first, stop))) or spelled.get((expert, None)) or f"{base}.{expert}.{part}_proj"
            yield Module(name, expert, rows, stop - first, k)


def module_problem(weight: Weight, fmt: Format, dialect: str) -> str | None:
    """Why a weight cannot be stored as quantized modules in a format, or None."""
    if len(weight.shape) == 2 and not weight.name.endswith(".weight"):
        return f"{dialect} stores modules, and {weight.name} is not the weight of one"
    if len(weight.shape) > 2 and not is_linear(weight):
        return f"{dialect} stores matrices, and {weight.name} has the shape {list(weight.shape)}"
    if weight.interleaved:
        return (
            f"{weight.name} interleaves its projections, and engines read the biases beside it that way; "
            "use the dialect halfbyte"
        )
    if bare_role(weight.role) == "embedding":
        return f"{weight.name} is an embedding, which no engine reads quantized; keep it"
    rows = fmt.block[0]
    if rows > 1 and any(first % rows for _, first, _ in weight.row_parts):
        return f"the projections fused in {weight.name} do not begin at blocks of {rows} rows"
    return None


def scaled_modules(kept: Iterable[Weight], endings: tuple[str, ...]) -> set[str]:
    """The modules whose activations have calibrated scales: those with such tensors among the kept ones."""
    return {w.name.rpartition(".")[0] for w in kept if w.name.endswith(endings)}


def is_linear(weight: Weight) -> bool:
    """Whether an engine may take a weight for a Linear module; MoE stacks become such."""
    if len(weight.shape) == 3:
        return "experts" in weight.role.split(".")
    return len(weight.shape) == 2 and weight.name.endswith(".weight")


def stored_bytes(array: Array) -> Array:
    """Codes and one-byte scales as uint8, whatever dtype their file gives them; other arrays as they are."""
    return np.ascontiguousarray(array).view(np.uint8) if array.dtype in _BYTES else array
