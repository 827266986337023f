"""Statistics of activations on disk: one folder, one safetensors file per part of the model, additive."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.calibration.importance import Importance
from halfbyte.calibration.rounded import KINDS, OBJECTIVE
from halfbyte.checkpoint import ShardWriter, TensorInfo, build_header, numpy_dtype, safetensors_name, write_file_atomic
from halfbyte.checkpoint.files import parse_object, read_small
from halfbyte.checkpoint.header import read_header
from halfbyte.checkpoint.identity import identities
from halfbyte.errors import CheckpointError, MeasurementError, OutputError

Array = NDArray[Any]
DESCRIPTION_FILE = "statistics.json"
VERSION = 1
_KIND = "halfbyte-statistics"
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # of a file in the folder itself
_MAXIMA = ("amax", "keys", "values")
_TYPES = {"count": "I64", "routed": "I64", "squares": "F64", "hessian": "F32", "output_hessian": "F32"}
_TYPES |= dict.fromkeys(_MAXIMA, "F32")
_TYPES[OBJECTIVE] = "F64"
_EXACT = ("source", "hessians", "output_hessians", "all_experts", "caches", "bos", "parts")


@dataclass
class Part:
    """What was collected for some weights: ``arrays`` by weight name, then by kind; ``same``: weight -> the one
    whose inputs it shares.

    Kinds: ``count`` int64 [] or [E], tokens seen; ``squares`` FP64 [K] or [E, K], sum of x²; ``amax`` FP32 [] or [E],
    largest |x|; ``hessian`` FP32 [K, K] or [E, K, K], sum of xᵀx, or [K, K] over all experts of a stack together;
    ``output_hessian`` FP32 [N, N] or [E, N, N], sum of gᵀg over the gradients g at the outputs; ``routed`` int64 [E],
    tokens that the router sent, where all experts were shown all tokens. Of weights that were rounded: see
    ``halfbyte.calibration.rounded``. By the name of an attention module: ``keys`` and ``values`` FP32 [], the largest
    magnitudes that its KV cache would hold.
    """

    arrays: dict[str, dict[str, Array]] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)


def write_part(folder: Path, name: str, part: Part) -> None:
    """Write a part to ``name``.safetensors, complete or not at all."""
    arrays = {f"{weight}.{kind}": a for weight, kinds in part.arrays.items() for kind, a in kinds.items()}
    order = sorted(arrays, key=lambda key: -arrays[key].dtype.itemsize)
    kinds = [key.rpartition(".")[2] for key in order]
    types = [_TYPES.get(kind) or safetensors_name(arrays[key].dtype) for key, kind in zip(order, kinds, strict=True)]
    entries = [(key, kind, arrays[key].shape) for key, kind in zip(order, types, strict=True)]
    layout = build_header(entries, {"format": _KIND, "version": str(VERSION), "same": json.dumps(part.same)})
    with ShardWriter(folder / f"{name}.safetensors", layout) as writer:
        for key, offset in zip(order, layout.offsets, strict=True):
            writer.write_at(offset, np.ascontiguousarray(arrays[key]))
        writer.commit()


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write what the statistics are of; a folder with ``complete`` set holds all parts."""
    write_file_atomic(folder / DESCRIPTION_FILE, (json.dumps(description, indent=2) + "\n").encode())


def read_description(folder: Path) -> dict[str, Any]:
    """What the statistics in a folder are of; CheckpointError if it holds none."""
    try:
        raw = read_small(folder / DESCRIPTION_FILE)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} holds no statistics of activations: {error}") from error
    description = parse_object(raw, str(folder / DESCRIPTION_FILE))
    if description.get("kind") != _KIND or description.get("version") != VERSION:
        raise CheckpointError(f"{folder / DESCRIPTION_FILE} is not of this halfbyte; collect the statistics again")
    _check_description(description, folder / DESCRIPTION_FILE)
    return description


def _check_description(description: Mapping[str, Any], where: Path) -> None:
    """CheckpointError where a key has another type, or a part has a name that is no plain name of a file."""
    parts, texts, done = description.get("parts"), description.get("texts", []), description.get("done", 0)
    numbers = [description.get(key, 0) for key in ("samples", "tokens", "length")]
    source = description.get("source", {})
    if not isinstance(parts, list) or not isinstance(texts, list) or not isinstance(source, dict):
        raise CheckpointError(f"{where} is damaged: `parts` and `texts` are lists, `source` is an object")
    if any(type(number) is not int or number < 0 for number in (*numbers, done)):
        raise CheckpointError(f"{where} is damaged: `samples`, `tokens`, `length` and `done` are whole numbers")
    for name in parts:
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise CheckpointError(
                f"{where} names a part {str(name)[:60]!r}, which is no plain name; the file is damaged"
            )
    if len(set(parts)) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{where} is damaged: a part is named twice, or a text has no name")


def new_description(**facts: Any) -> dict[str, Any]:
    """The beginning of a statistics.json."""
    return {"kind": _KIND, "version": VERSION, "complete": False, **facts}


class Statistics:
    """Statistics of a whole model; arrays are read when they are asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.description = read_description(self.folder)
        if not self.description.get("complete"):
            raise CheckpointError(f"{folder} holds statistics that are not complete; run the calibration again")
        parts = [f"{part}.safetensors" for part in self.description["parts"]]
        self.identities = identities(self.folder, [DESCRIPTION_FILE, *parts])
        self._entries: dict[str, TensorInfo] = {}
        self.same: dict[str, str] = {}
        for file in parts:
            tensors, metadata, _ = read_header(self.folder / file, file)
            if metadata.get("format") != _KIND:
                raise CheckpointError(f"{self.folder / file} holds no statistics; collect them again")
            self._entries.update({t.name: t for t in tensors})
            self.same.update(_shared(metadata.get("same", "{}"), self.folder / file))

        self._check_kinds()

    def _check_kinds(self) -> None:
        """CheckpointError for an array of a kind, type or shape that statistics do not have."""
        for name, info in self._entries.items():
            weight, _, kind = name.rpartition(".")
            if not weight or (_TYPES.get(kind) != info.dtype and kind not in KINDS):
                raise CheckpointError(
                    f"{name} in {self.folder / info.file} is no array of statistics; collect them again"
                )
            if kind == "count" and f"{weight}.squares" not in self._entries:
                raise CheckpointError(f"{self.folder / info.file} lacks {weight}.squares; collect the statistics again")

    @cached_property
    def names(self) -> list[str]:
        """Weights whose inputs were seen, shared inputs included."""
        counted = [name.rpartition(".")[0] for name in self._entries if name.endswith(".count")]
        return [*counted, *self.same]

    def array(self, weight: str, kind: str) -> Array | None:
        """An array of a weight (see ``Part``), mapped from its file, or None where it was not collected."""
        # inputs may be shared, outputs are a weight's own
        owner = weight if kind == "output_hessian" else self.same.get(weight, weight)
        values = self._read(f"{owner}.{kind}")
        if values is None:
            return None
        if kind in ("count", "squares", "amax") and not (np.isfinite(values).all() and (values >= 0).all()):
            raise MeasurementError(
                f"{kind} of {weight} in {self.folder} is negative or not finite, so it says nothing; calibrate again"
            )
        return values

    def _read(self, entry: str) -> Array | None:
        info = self._entries.get(entry)
        if info is None:
            return None
        return np.memmap(self.folder / info.file, numpy_dtype(info.dtype), "r", info.offset, info.shape)

    def hessian(self, weight: str, expert: int | None = None) -> NDArray[np.float32] | None:
        """Mean of xᵀx, FP32 [K, K], of one expert where a stack has one for each; None where there is no data."""
        if self.array(weight, "hessian") is None or self.array(weight, "count") is None:
            return None
        sums, tokens = self.hessian_sum(weight, expert)
        return np.asarray(sums) / np.float32(tokens) if tokens else None

    def hessian_sum(self, weight: str, expert: int | None = None) -> tuple[Array, int]:
        """Return the sum of xᵀx, FP32 [K, K] mapped from its file, and over how many tokens; for what has a Hessian.

        ``expert``: of a stack; all its experts have the same where one was collected for all.
        """
        sums, count = self.array(weight, "hessian"), self.array(weight, "count")
        assert sums is not None and count is not None
        has_expert = expert is not None and sums.ndim == 3
        return (sums[expert], int(count[expert])) if has_expert else (sums, int(count.sum()))

    def output_hessian(self, weight: str, expert: int | None = None) -> NDArray[np.float32] | None:
        """Sum of gᵀg over the gradients at a weight's outputs, FP32 [N, N] mapped from its file; None without any.

        Not that of weights which share the inputs of this one: outputs are a weight's own.
        """
        sums = self._read(f"{weight}.output_hessian")
        return sums if sums is None or expert is None or sums.ndim < 3 else np.asarray(sums[expert])

    def importance(self) -> Importance:
        """Mean squared activations, as an importance file holds them."""
        importance = Importance({}, {}, datasets=tuple(self.description.get("texts", ())))
        for name in self.names:
            count, squares = self.array(name, "count"), self.array(name, "squares")
            assert count is not None and squares is not None
            tokens = np.maximum(count, 1)[..., None]
            importance.values[name] = (squares / tokens).astype(np.float32)
            importance.counts[name] = np.array(count)
        return importance


def _shared(text: str, where: Path) -> dict[str, str]:
    """Weights and the one whose inputs each shares; CheckpointError where this is something else."""
    shared = parse_object(text.encode(), f"`same` of {where}")
    if not all(isinstance(name, str) for name in shared.values()):
        raise CheckpointError(f"`same` of {where} does not name weights; collect the statistics again")
    return shared


def merge(folders: Sequence[str | Path], out: str | Path) -> None:
    """Add up statistics of one model over different texts; the result is as if they had been collected in one run.

    CheckpointError where they are of different models or were collected in different ways.
    """
    every = [Statistics(folder) for folder in folders]
    rounded = next((s for s in every if s.description.get("rounded")), None)
    if rounded is not None:
        raise CheckpointError(f"{rounded.folder} holds weights that were rounded, which cannot be added up")
    if len({s.folder.resolve() for s in every}) < max(2, len(every)):
        raise CheckpointError("merging needs two or more different folders of statistics")
    first, out = every[0], Path(out)
    for other in every[1:]:
        for key in _EXACT:
            if other.description.get(key) != first.description.get(key):
                raise CheckpointError(
                    f"{other.folder} and {first.folder} differ in {key!r}; only statistics of one model, collected in "
                    "the same way, can be added"
                )
    if out.exists() and any(out.iterdir()):
        raise OutputError(f"{out} is not empty; choose another folder for the merged statistics")
    out.mkdir(parents=True, exist_ok=True)
    for part in first.description["parts"]:
        write_part(out, part, _sum(part, every))
    description = {**first.description, "texts": [t for s in every for t in s.description["texts"]]}
    for key in ("samples", "tokens"):
        description[key] = sum(s.description[key] for s in every)
    write_description(out, description)


def _sum(part: str, every: Sequence[Statistics]) -> Part:
    total = Part()
    for entry in (name for name, info in every[0]._entries.items() if info.file == f"{part}.safetensors"):
        weight, _, kind = entry.rpartition(".")
        arrays = list(_all(every, weight, kind))
        # sums of one input can be filed under another of the weights that share it, but never go missing
        merged = np.maximum.reduce(arrays) if kind in _MAXIMA else np.sum(arrays, axis=0, dtype=arrays[0].dtype)
        total.arrays.setdefault(weight, {})[kind] = merged
    total.same = {a: b for a, b in every[0].same.items() if b in total.arrays}
    return total


def _all(every: Sequence[Statistics], weight: str, kind: str) -> Iterator[Array]:
    for statistics in every:
        array = statistics.array(weight, kind)
        if array is None:
            raise CheckpointError(f"{statistics.folder} lacks {kind} of {weight}; collect the statistics again")
        yield array
