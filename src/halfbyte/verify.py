"""Files against source: every tensor accounted for, kept ones identical, quantized ones within their error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.checkpoint import Inventory, Reader, numpy_dtype
from halfbyte.dialects import OutputTensor, unquantized_config
from halfbyte.errors import CheckpointError, HalfbyteError, VerifyError
from halfbyte.formats import BlockFormat, Format, QuantizedTensor, get_format
from halfbyte.kernels import amax
from halfbyte.measure import TensorError
from halfbyte.models import Weight
from halfbyte.plan import INDEX, PROVENANCE
from halfbyte.quantized import INPUT_SCALE, LOSSLESS, claim, input_scales
from halfbyte.recipes import Decision, parse_recipe, resolve
from halfbyte.search.blocks import to_blocks
from halfbyte.units import SLICE_BYTES
from halfbyte.view import FLOATS, Checkpoint

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
    def lossless(self) -> int:
        """How many weights that the source holds quantized have exactly its values."""
        return sum(error.lossless for error in self.errors)

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
    result.problems += _files(folder, ours.inventory, source)
    if ours.dialect is None:
        result.problems.append("config.json has no quantization_config, so engines would misread the packed tensors")
        return result
    decisions = _decisions(folder, source)
    found = {weight.name: weight for weight in ours.weights}
    scales = input_scales(source, ours.dialect, ours.formats)
    report = progress or (lambda _: None)
    with Reader(ours.inventory) as left, Reader(source.inventory) as right:
        pair = _Pair(result, ours, source, left, right, max_relmse)
        for weight in source.weights:
            respelled, decision = scales.get(weight.name), decisions.get(weight.name)
            twin = found.pop(respelled.name if respelled else weight.name, None)
            if decision and decision.action == "drop":
                result.dropped[weight.name] = decision.reason
                if twin is not None:
                    result.problems.append(f"{weight.name} is there, but the recipe drops it")
            elif twin is None and weight.name in scales:
                result.dropped[weight.name] = INPUT_SCALE
            elif twin is not None and respelled:
                pair.respelled(weight, respelled)
            elif twin is None:
                result.problems.append(f"{weight.name} of the source is missing, and no rule of the recipe drops it")
            else:
                try:
                    pair.check(weight, twin, decision)
                except CheckpointError as error:
                    result.problems.append(str(error))
            report(sum(source.inventory.tensors[n].nbytes for n in weight.sources if n in source.inventory.tensors))
        result.problems += [f"{name} is not in the source; it does not belong here" for name in found]
        result.problems += _shared_scales(ours, left)
    return result


@dataclass
class _Pair:
    """A converted checkpoint beside its source, both open."""

    result: Verification
    ours: Checkpoint
    source: Checkpoint
    left: Reader
    right: Reader
    max_relmse: float

    def check(self, weight: Weight, twin: Weight, decision: Decision | None) -> None:
        """One weight, against what the recipe wants of it, or against what it seems to be where there is none."""
        fmt, before = self.ours.formats.get(twin.name), self.source.formats.get(weight.name)
        if decision is None:
            wanted, keep = fmt, fmt == before
        else:
            wanted = get_format(decision.format) if decision.format else before
            keep = decision.action == "keep"
            if wanted is not None and wanted.problem(twin.shape) and decision.indivisible == "keep":
                wanted, keep = before, True
        if fmt != wanted:
            said = [f.name if f else "unquantized" for f in (fmt, wanted)]
            self.result.problems.append(f"{weight.name} is {said[0]}, but the recipe wants it {said[1]}")
        if keep and (before is None or self.ours.dialect is self.source.dialect):
            self._kept([o.name for o in self.source.stored(weight)] if before else weight.sources)
        elif fmt is not None:
            self._quantized(weight, twin, fmt)

    def respelled(self, weight: Weight, output: OutputTensor) -> None:
        """A scale of activations, which may have become its reciprocal."""
        before, after = self.right.read(weight.name).astype(np.float32), self.left.read(output.name)
        wanted = np.float32(1) / before if output.part == "reciprocal" else before
        if after.size != 1 or after.reshape(-1) != wanted.reshape(-1):
            self.result.problems.append(f"{output.name} is not what {weight.name} of the source says")

    def _kept(self, names: Iterable[str]) -> None:
        self.result.kept += 1
        problems = self.result.problems
        for name in names:
            a, b = self.ours.inventory.tensors.get(name), self.source.inventory.tensors[name]
            if a is None:
                problems.append(f"{name} of the source is missing")
            elif (a.dtype, a.shape) != (b.dtype, b.shape):
                problems.append(f"{name} is {a.dtype} {list(a.shape)}, but {b.dtype} {list(b.shape)} in the source")
            elif any(x != y for x, y in zip(_chunks(self.left, name), _chunks(self.right, name), strict=True)):
                problems.append(f"{name} was to be kept, but its bytes differ from the source")
            elif b.dtype in FLOATS and not _finite(_chunks(self.left, name), b.dtype):
                problems.append(f"{name} holds a NaN or an infinity")

    def _quantized(self, weight: Weight, twin: Weight, fmt: Format) -> None:
        self.result.quantized += 1
        problems = self.result.problems
        before = self.source.formats.get(weight.name)
        whole = TensorError(weight.name, weight.role, fmt.name, 0, source=before.name if before else "")
        self.result.errors.append(whole)
        for first, stop in _slices(twin):
            tensor = self.ours.read_quantized(self.left, twin, first, stop)
            dense = self.source.read(self.right, weight, first, stop)
            if dense.shape != tensor.shape:
                problems.append(f"{weight.name} has shape {list(tensor.shape)}, but {list(dense.shape)} in the source")
                return
            part = TensorError(weight.name, weight.role, fmt.name, dense.size)
            part.add(dense, tensor)
            whole.merge(part)
            if len(twin.shape) > 2:
                self._judge(part, f"expert {first} of {weight.name}")
            if _vanished(dense, tensor):
                problems.append(f"{weight.name} has a zero scale on a block that is not zero in the source")
        if len(twin.shape) == 2:
            self._judge(whole, weight.name)
        if before and not whole.lossless and self._claim(weight, before, fmt) == LOSSLESS:
            problems.append(f"{weight.name} has the format of the source, {fmt.name}, but other values")
        for output in self.ours.stored(twin):
            if output.constant is not None and tuple(self.left.read(output.name)) != output.constant:
                problems.append(f"{output.name} does not hold {list(output.constant)}")

    def _claim(self, weight: Weight, before: Format, fmt: Format) -> str | None:
        assert self.source.dialect is not None and self.ours.dialect is not None
        return claim(weight, before, fmt, self.source.dialect, self.ours.dialect)

    def _judge(self, error: TensorError, what: str) -> None:
        if not math.isfinite(error.squared_error):
            self.result.problems.append(f"{what} decodes to a NaN or an infinity")
        elif not error.relmse <= self.max_relmse:
            self.result.problems.append(
                f"{what} has a relative error of {error.relmse:.3g} against the source "
                f"(at most {self.max_relmse:g} is allowed)"
            )


def _chunks(reader: Reader, name: str) -> Iterator[memoryview]:
    return reader.chunks(name, SLICE_BYTES)


def _finite(chunks: Iterable[memoryview], dtype: str) -> bool:
    return all(amax(np.frombuffer(chunk, numpy_dtype(dtype)))[1] for chunk in chunks)


def _slices(weight: Weight) -> Iterator[tuple[int, int]]:
    """Expert by expert, since a wrong one is lost in the error of many; a matrix in rows, whole tiles of them."""
    step = 1
    if len(weight.shape) == 2:
        step = max(128, SLICE_BYTES // (2 * weight.shape[1]) // 128 * 128)
    return ((first, min(first + step, weight.shape[0])) for first in range(0, weight.shape[0], step))


def _vanished(source: NDArray[Any], tensor: QuantizedTensor) -> bool:
    fmt = tensor.format
    if not isinstance(fmt, BlockFormat) or fmt.scale.name != "e4m3" or fmt.block[0] != 1:
        return False
    zero = (tensor.scales & 127) == 0
    if not zero.any():
        return False
    blocks = to_blocks(source.reshape(-1, *source.shape[-2:]), fmt.block)
    return bool((blocks.any(axis=-1).reshape(zero.shape) & zero).any())


def _shared_scales(ours: Checkpoint, reader: Reader) -> list[str]:
    """Matrices that engines fuse must share one scale, where they have one for the whole tensor."""
    seen: dict[str, tuple[str, float]] = {}
    problems = []
    for weight in ours.weights:
        fmt = ours.formats.get(weight.name)
        if weight.group is None or not isinstance(fmt, BlockFormat):
            continue
        part = "tensor_scale" if fmt.has_tensor_scale else "scales" if fmt.block == (-1, -1) else None
        names = [o.name for o in ours.dialect.outputs(weight, fmt) if o.part == part] if ours.dialect else []
        if not names or names[0] not in ours.inventory.tensors:
            continue
        value = float(reader.read(names[0]).reshape(-1)[0])
        other, expected = seen.setdefault(weight.group, (weight.name, value))
        if value != expected:
            problems.append(f"{weight.name} and {other} are fused by engines but have different tensor scales")
    return problems


def _unfinished(folder: Path) -> None:
    if folder.is_dir() and (folder / ".halfbyte").exists():
        raise VerifyError(f"{folder} is an unfinished conversion; run the same quantize command again to complete it")


def _decisions(folder: Path, source: Checkpoint) -> dict[str, Decision]:
    """What the recipe in halfbyte.json wants of each weight; nothing where there is no such file."""
    path = folder / PROVENANCE
    if not path.is_file():
        return {}
    try:
        recipe = parse_recipe(json.dumps(json.loads(path.read_bytes())["recipe"]), "its recipe")
        decisions = resolve(recipe, source.weights)
    except (ValueError, KeyError, TypeError, HalfbyteError) as error:
        raise VerifyError(f"{path} cannot be used with this source ({error}); is it the right source?") from error
    return {w.name: d for w, d in zip(source.weights, decisions, strict=True)}


def _files(folder: Path, ours: Inventory, checkpoint: Checkpoint) -> list[str]:
    source = checkpoint.inventory
    replaced = {PROVENANCE, *(checkpoint.dialect.files if checkpoint.dialect else ())}
    """Everything but the weights: side files, config.json, index."""
    problems = []
    for name, size in source.side_files.items():
        if name in replaced or source.root is None or ours.root is None:
            continue
        path = ours.root / name
        if not path.is_file():
            problems.append(f"the side file {name} of the source is missing")
        elif path.stat().st_size != size or path.read_bytes() != (source.root / name).read_bytes():
            problems.append(f"the side file {name} differs from the source")
    stray = [name for name in ours.ignored_files if name.endswith(".safetensors")]
    if stray:
        problems.append(f"{stray[0]} is a weight file that the index does not name; an engine may load it instead")
    if not ours.config:
        problems.append("config.json is missing")
    left, right = _comparable(ours.config), _comparable(source.config)
    for key in sorted({*left, *right}):
        if ours.config and left.get(key) != right.get(key):
            problems.append(f"config.json differs from the source in {key}")
    stated = ours.meta.get("total_size")
    if (folder / INDEX).exists() and stated != ours.total_bytes:
        problems.append(f"the index states {stated} bytes of tensors, but there are {ours.total_bytes}")
    return problems


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """What a conversion leaves as it is: all but the quantization and our own remote code."""
    code = config.get("auto_map") or {}
    own = all(str(value).startswith("halfbyte_quantizer.") for value in code.values())
    return {k: v for k, v in unquantized_config(config).items() if not (k == "auto_map" and own)}
