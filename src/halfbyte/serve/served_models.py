"""The checkpoints that are served: their precision, dialect and size, from headers alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from halfbyte.errors import HalfbyteError
from halfbyte.formats import get_format
from halfbyte.serve.decision import Precision
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.overview import Overview, overview
from halfbyte.source.running import file_of

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,63})=(.+)")
_DENSE_BITS = {"F32": 32.0, "F64": 64.0}


@dataclass(frozen=True)
class ServedModel:
    """One checkpoint: what to open, its precision, its dialect (None: unquantized) and bytes, also as BF16 weights."""

    path: str
    precision: Precision
    dialect: str | None
    nbytes: int
    dense_nbytes: int


def read_model(spec: str) -> ServedModel:
    """Read ``PATH`` or ``NAME=PATH``; the name of a precision is that of the format of most weights."""
    match = _NAMED.fullmatch(spec)
    name, path = (match[1], match[2]) if match else ("", spec)
    summary = overview(Checkpoint.open(path))
    stored = Counter[str]()
    for role in summary.roles:
        for fmt, weights in role.formats.items():
            stored[fmt] += role.parameters * weights // max(role.weights, 1)
    bits, usual = _bits_and_name(stored, summary)
    # of two formats with as many bits the one with the larger scales counts as the finer one
    precision = Precision(name or usual, round(bits + min(summary.bits_per_weight, 99) / 100, 4))
    return ServedModel(file_of(path), precision, summary.dialect, summary.data_bytes, 2 * summary.parameters)


def read_models(specs: Iterable[str]) -> list[ServedModel]:
    """Read all models; HalfbyteError where two would have the same name."""
    models = [read_model(spec) for spec in specs]
    for name, count in Counter(model.precision.name for model in models).items():
        if count > 1:
            raise HalfbyteError(f"{count} models have the precision {name}; name them, such as other={models[-1].path}")
    return models


def memory_note(models: list[ServedModel]) -> str:
    """Say what several precisions cost in memory."""
    total, largest = (f(model.nbytes for model in models) for f in (sum, max))
    return (
        f"weights of {len(models)} models: {total / 1e9:.2f} GB, of which the largest has {largest / 1e9:.2f} GB; "
        "they share nothing, and each engine needs memory for its own cache"
    )


def _bits_and_name(stored: Counter[str], summary: Overview) -> tuple[float, str]:
    if stored:
        fmt = stored.most_common(1)[0][0]
        return float(get_format(fmt).bits), fmt
    dtypes = Counter[str]()
    for role in summary.roles:
        dtypes.update(dict.fromkeys(role.dtypes, role.parameters))
    dtype = dtypes.most_common(1)[0][0] if dtypes else "BF16"
    return _DENSE_BITS.get(dtype, 16.0), dtype.lower()
