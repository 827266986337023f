"""Files against source: every tensor accounted for, kept ones identical, quantized ones within their error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.checkpoint import Inventory, Reader, numpy_dtype
from halfbyte.convert import SLICE_BYTES, TensorError
from halfbyte.errors import CheckpointError, HalfbyteError, VerifyError
from halfbyte.formats import BlockFormat, QuantizedTensor
from halfbyte.models import Weight
from halfbyte.plan import INDEX, PROVENANCE
from halfbyte.recipes import Recipe, resolve
from halfbyte.search.blocks import to_blocks
from halfbyte.view import FLOATS, Checkpoint, rows_of

MAX_RELMSE = 0.1
"""A quantized tensor further than this from its source is not the same tensor."""


@dataclass
class Verification:
    """The outcome: ``problems`` is empty when the output is complete and right."""

    out: str
    source: str
    problems: list[str] = field(default_factory=list)
    kept: int = 0
    quantized: int = 0
    dropped: dict[str, str] = field(default_factory=dict)
    errors: list[TensorError] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def relmse(self) -> float:
        """Squared error over sum of squares, all quantized weights together."""
        squares = sum(e.squares for e in self.errors)
        return sum(e.squared_error for e in self.errors) / squares if squares else 0.0


def verify(
    out: str | Path,
    against: str | Path,
    revision: str | None = None,
    max_relmse: float = MAX_RELMSE,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Compare a converted checkpoint with its source, reading both completely.

    Problems are collected, not raised; CheckpointError or VerifyError only where a folder cannot be read at all.
    """
    result = Verification(str(out), str(against))
    folder = Path(out)
    _unfinished(folder)
    ours = Checkpoint(Inventory.open(out))
    source = Checkpoint(Inventory.open(against, revision))
    found = {weight.name: weight for weight in ours.weights}
    dropped = _dropped(folder, source)
    report = progress or (lambda _: None)
    with Reader(ours.inventory) as left, Reader(source.inventory) as right:
        for weight in source.weights:
            twin = found.pop(weight.name, None)
            if twin is None and weight.name in dropped:
                result.dropped[weight.name] = dropped[weight.name]
            elif twin is None:
                result.problems.append(f"{weight.name} of the source is missing, and no rule of the recipe drops it")
            else:
                try:
                    _weight(result, weight, twin, ours, source, left, right, max_relmse)
                except CheckpointError as error:
                    result.problems.append(str(error))
            report(sum(source.inventory.tensors[n].nbytes for n in weight.sources if n in source.inventory.tensors))
        for weight in ours.weights:
            if weight.name in found:
                result.problems.append(f"{weight.name} is not in the source; it does not belong here")
        result.problems += _tensor_scales(ours, left)
    result.problems += _files(folder, ours.inventory, source.inventory)
    return result


def _weight(
    result: Verification,
    weight: Weight,
    twin: Weight,
    ours: Checkpoint,
    source: Checkpoint,
    left: Reader,
    right: Reader,
    max_relmse: float,
) -> None:
    if twin.name in ours.formats and not (weight.name in source.formats and _same_storage(weight, ours, source)):
        result.quantized += 1
        error = _compare(result, weight, twin, ours, source, left, right)
        result.errors.append(error)
        if not error.relmse <= max_relmse:
            result.problems.append(
                f"{weight.name} has a relative error of {error.relmse:.3g} against the source "
                f"(at most {max_relmse:g} is allowed)"
            )
        return
    result.kept += 1
    names = [o.name for o in source.stored(weight)] if weight.name in source.formats else list(weight.sources)
    for name in names:
        a, b = ours.inventory.tensors.get(name), source.inventory.tensors[name]
        if a is None:
            result.problems.append(f"{name} of the source is missing")
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            result.problems.append(f"{name} is {a.dtype} {list(a.shape)}, but {b.dtype} {list(b.shape)} in the source")
        elif any(x != y for x, y in zip(left.chunks(name, SLICE_BYTES), right.chunks(name, SLICE_BYTES), strict=True)):
            result.problems.append(f"{name} was to be kept, but its bytes differ from the source")
        elif b.dtype in FLOATS and not _finite(left, name, b.dtype):
            result.problems.append(f"{name} holds a NaN or an infinity")


def _same_storage(weight: Weight, ours: Checkpoint, source: Checkpoint) -> bool:
    return ours.dialect is source.dialect and all(o.name in ours.inventory.tensors for o in source.stored(weight))


def _finite(reader: Reader, name: str, dtype: str) -> bool:
    return all(np.isfinite(np.frombuffer(c, numpy_dtype(dtype))).all() for c in reader.chunks(name, SLICE_BYTES))


def _compare(
    result: Verification,
    weight: Weight,
    twin: Weight,
    ours: Checkpoint,
    source: Checkpoint,
    left: Reader,
    right: Reader,
) -> TensorError:
    fmt = ours.formats[twin.name]
    error = TensorError(weight.name, weight.role, fmt.name, int(np.prod(twin.shape)))
    for first, stop, tensor in _slices(ours, twin, left):
        dense = source.read(right, weight, first, stop)
        if dense.shape != tensor.shape:
            result.problems.append(
                f"{weight.name} has shape {list(twin.shape)}, but {list(weight.shape)} in the source"
            )
            break
        error.add(dense, tensor)
        if not np.isfinite(tensor.decode()).all():
            result.problems.append(f"{weight.name} decodes to a NaN or an infinity")
        if _vanished(dense, tensor):
            result.problems.append(f"{weight.name} has a zero scale on a block that is not zero in the source")
    return error


def _slices(ours: Checkpoint, weight: Weight, reader: Reader) -> Iterator[tuple[int, int, QuantizedTensor]]:
    count = weight.shape[0]
    per_index = 2 * int(np.prod(weight.shape[1:]))
    step = max(1, SLICE_BYTES // per_index)
    if len(weight.shape) > 2:
        for first in range(0, count, step):
            stop = min(first + step, count)
            yield first, stop, ours.read_quantized(reader, weight, first, stop)
        return
    whole = ours.read_quantized(reader, weight)
    step = max(128, step // 128 * 128)
    for first in range(0, count, step):
        stop = min(first + step, count)
        yield first, stop, rows_of(whole, first, stop)


def _vanished(source: NDArray[Any], tensor: QuantizedTensor) -> bool:
    fmt = tensor.format
    if not isinstance(fmt, BlockFormat) or fmt.scale.name != "e4m3" or fmt.block[0] != 1:
        return False
    zero = (tensor.scales & 127) == 0
    if not zero.any():
        return False
    blocks = to_blocks(source.reshape(-1, *source.shape[-2:]), fmt.block)
    return bool((blocks.any(axis=-1).reshape(zero.shape) & zero).any())


def _tensor_scales(ours: Checkpoint, reader: Reader) -> list[str]:
    """Matrices that engines fuse must share one tensor scale."""
    seen: dict[str, tuple[str, float]] = {}
    problems = []
    for weight in ours.weights:
        fmt = ours.formats.get(weight.name)
        if weight.group is None or not (isinstance(fmt, BlockFormat) and fmt.has_tensor_scale):
            continue
        name = next(o.name for o in ours.stored(weight) if o.part == "tensor_scale")
        value = float(reader.read(name).reshape(-1)[0])
        other, expected = seen.setdefault(weight.group, (weight.name, value))
        if value != expected:
            problems.append(f"{weight.name} and {other} are fused by engines but have different tensor scales")
    return problems


def _unfinished(folder: Path) -> None:
    if folder.is_dir() and (folder / ".halfbyte").exists():
        raise VerifyError(f"{folder} is an unfinished conversion; run the same quantize command again to complete it")


def _dropped(folder: Path, source: Checkpoint) -> dict[str, str]:
    """What the recipe in halfbyte.json drops, with its reasons."""
    path = folder / PROVENANCE
    if not path.is_file():
        return {}
    try:
        recipe = Recipe.model_validate_json(json.dumps(json.loads(path.read_bytes())["recipe"]))
        decisions = resolve(recipe, source.weights)
    except (ValueError, KeyError, TypeError, HalfbyteError) as error:
        raise VerifyError(f"{path} cannot be used with this source ({error}); is it the right source?") from error
    return {w.name: d.reason for w, d in zip(source.weights, decisions, strict=True) if d.action == "drop"}


def _files(folder: Path, ours: Inventory, source: Inventory) -> list[str]:
    problems = []
    for name in source.side_files:
        if name == PROVENANCE or source.root is None or ours.root is None:
            continue
        path = ours.root / name
        if not path.is_file():
            problems.append(f"the side file {name} of the source is missing")
        elif path.stat().st_size != source.side_files[name] or path.read_bytes() != (source.root / name).read_bytes():
            problems.append(f"the side file {name} differs from the source")
    if not ours.config:
        problems.append("config.json is missing")
    elif ours.config.get("model_type") != source.config.get("model_type"):
        problems.append("config.json names another model type than the source's")
    stated = ours.meta.get("total_size")
    if (folder / INDEX).exists() and stated != ours.total_bytes:
        problems.append(f"the index states {stated} bytes of tensors, but there are {ours.total_bytes}")
    return problems
