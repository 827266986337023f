"""What a dialect is: an engine's spelling of quantized tensors, both ways."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from halfbyte.checkpoint import Inventory, Reader, TensorInfo, numpy_dtype
from halfbyte.dialects.outputs import (
    Array,
    CacheScales,
    Container,
    InputScale,
    OutputChunk,
    OutputTensor,
    UnequalScalesError,
)
from halfbyte.dialects.quantization_config import quantization_config_of
from halfbyte.errors import CheckpointError, PlanError
from halfbyte.formats import Format, QuantizedTensor
from halfbyte.models import Weight


class Dialect(ABC):
    """Names, packing and configuration of one engine family.

    ``global_scale_inv``: global scales are stored as reciprocals, and the stored number is the exact one. ``files``:
    the files beside the weights that only this dialect's readers look at. ``input_scales``: endings of the names of
    tensors that hold calibrated scales of activations, not of weights. ``cache_scales``: how those of a KV cache are
    spelled, if they are. ``upright``: stacks of experts lie as
    [E, N, K] also where the family's unquantized ones lie as [E, K, N]. ``standalone``: the weight files hold
    configuration and tokenizer, so that nothing but halfbyte.json lies beside them; by default they are one file.
    ``power_of_two``: only powers of two are stored exactly as global scales.
    """

    name: str
    about: str
    global_scale_inv: bool = False
    files: tuple[str, ...] = ()
    input_scales: tuple[str, ...] = ()
    cache_scales: CacheScales | None = None
    upright: bool = True
    standalone: bool = False
    power_of_two: bool = False

    def for_model(self, inventory: Inventory) -> Dialect:
        """This dialect for one model, where names and layout depend on the model; PlanError if it cannot hold it."""
        return self

    def format_for(self, weight: Weight, fmt: Format) -> Format:
        """The format that stands for another one where engines have no room for all of its parts."""
        return fmt

    @abstractmethod
    def problem(self, weight: Weight, fmt: Format) -> str | None:
        """Why this dialect cannot spell this weight in this format, or None."""

    @abstractmethod
    def outputs(self, weight: Weight, fmt: Format) -> list[OutputTensor]:
        """The tensors that stand for a quantized weight, in file order."""

    def stored(self, weight: Weight, fmt: Format, tensors: Mapping[str, TensorInfo]) -> list[OutputTensor]:
        """The tensors of an existing checkpoint that hold a weight, where others spell it in more than one way."""
        return self.outputs(weight, fmt)

    @abstractmethod
    def pack(self, output: OutputTensor, part: Array, fmt: Format) -> Array:
        """A part of a quantized tensor (rows and experts already selected) as it is stored."""

    @abstractmethod
    def unpack(self, output: OutputTensor, stored: Array, fmt: Format, shape: tuple[int, ...]) -> Array:
        """The inverse of ``pack``, for a part of this shape."""

    @abstractmethod
    def config(self, quantized: Sequence[tuple[Weight, Format]], kept: Sequence[Weight]) -> dict[str, Any]:
        """The ``quantization_config`` of the output's config.json."""

    def unfit(self, weight: Weight, fmt: Format) -> str | None:
        """Why a weight's shape does not fit this dialect's packing of a format, or None; like ``Format.problem``."""
        return None

    def left_out(self, weight: Weight) -> str | None:
        """Why this dialect's readers have no use for an unquantized weight, which is then not written; or None."""
        return None

    def kept(self, weight: Weight, outputs: list[OutputTensor]) -> list[OutputTensor]:
        """The tensors of an unquantized weight. ``outputs`` are those of the source, with ``copy`` as their part.

        Others are filled by ``spell`` from the weight's values. PlanError if there is no place for it.
        """
        return outputs

    def spell(self, outputs: Sequence[OutputTensor], values: Array, first: int) -> Iterator[OutputChunk]:
        """Cut leading indices from ``first`` on of an unquantized weight into stored arrays.

        Here: each output holds all of them (``values``), or its two last axes swapped (``turned``).
        """
        for output in outputs:
            array = np.swapaxes(values, -1, -2) if output.part == "turned" else values
            start = first * math.prod(output.shape[1:])
            yield OutputChunk(output, start, np.ascontiguousarray(array.astype(numpy_dtype(output.dtype), copy=False)))

    def read_kept(self, reader: Reader, weight: Weight, first: int, stop: int) -> Array | None:
        """Leading indices first..stop of an unquantized weight that ``spell`` wrote; None: it lies as in a source."""
        return None

    def kept_names(self, weight: Weight) -> list[str]:
        """The tensors of this dialect's files that hold an unquantized weight."""
        return list(weight.sources)

    def differences(self, source: Inventory) -> list[str]:
        """Of a ``standalone`` dialect bound to an output: its configuration and tokenizer that are not the source's."""
        return []

    def container(
        self, inventory: Inventory, recipe: str, tensors: Sequence[tuple[Weight, Format | None, list[OutputTensor]]]
    ) -> Container:
        """How the tensors of a conversion of ``inventory`` lie in files; PlanError if something is lacking for it."""
        return Container()

    def complete(self, config: dict[str, Any]) -> dict[str, Any]:
        """The output's config.json, from the source's with ``quantization_config``; PlanError if engines misread it."""
        return config

    def original_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of ``complete``."""
        return dict(config)

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, bytes]:
        """Further files for a ``quantization_config`` that ``config`` made, name -> content."""
        return {}

    def input_scale(self, fmt: Format) -> InputScale | None:
        """The scale of a module's activations beside weights in a format, where engines use one."""
        return None

    def activations_problem(self, fmt: Format, kind: str) -> str | None:
        """Why engines cannot quantize the inputs of weights in a format this way (none, dynamic, static), or None."""
        if kind == "none":
            return None
        return f"the dialect {self.name} has no word for {kind} activations beside {fmt.name}"

    def activations_of(self, inventory: Inventory, weight: Weight) -> dict[str, Any] | None:
        """How a checkpoint's configuration quantizes the inputs of a weight ({}: not at all); None: it does not say."""
        return None

    def with_activations(self, kinds: Mapping[str, Any]) -> Dialect:
        """This dialect, whose configuration says how the inputs of these weights (by name) are quantized.

        Values are words of recipes (none, dynamic, static) or what ``activations_of`` found.
        """
        return self

    def inherited(self, inventory: Inventory) -> dict[str, Any]:
        """Settings of a source in this dialect that are not about weights; its outputs in this dialect keep them."""
        scheme = quantization_config_of(inventory).get("kv_cache_scheme")
        return {"kv_cache_scheme": scheme} if scheme else {}

    def notes(self, quantized: Sequence[tuple[Weight, Format]]) -> list[str]:
        """What a user should know about this output before writing it."""
        return []

    def notes_on_kept(self, kept: Sequence[Weight]) -> list[str]:
        """What a user should know about unquantized weights of this output."""
        return []

    @abstractmethod
    def claims(self, inventory: Inventory) -> bool:
        """Whether a checkpoint is written in this dialect."""

    @abstractmethod
    def dense(self, inventory: Inventory) -> tuple[dict[str, TensorInfo], dict[str, Format]]:
        """A quantized checkpoint's tensors as if they were dense, and the format of each quantized one.

        Keys are the names that the weights have in a source checkpoint (before experts are gathered).
        """

    def write(
        self, outputs: Sequence[OutputTensor], fmt: Format, tensor: QuantizedTensor, expert: int, row: int
    ) -> Iterator[OutputChunk]:
        """Cut a quantized slice of a weight into stored arrays.

        ``tensor`` holds leading indices from ``expert`` on (for stacks) and rows from ``row`` on.
        """
        stacked = len(tensor.shape) > 2
        count = tensor.shape[0] if stacked else 1
        for output in outputs:
            if output.expert is not None and not expert <= output.expert < expert + count:
                continue
            if output.constant is not None:
                yield OutputChunk(output, 0, np.array(output.constant, dtype=numpy_dtype(output.dtype)))
                continue
            part = _part(tensor, output.part)
            if output.expert is not None:
                part = part[output.expert - expert]
            if output.rows is not None:
                region = _region(output.rows, output.part, fmt)
                part = part[:, region] if stacked and output.expert is None else part[region]
            if part.dtype.itemsize > 1:
                # the plan chose a type that rounds no scale
                part = part.astype(numpy_dtype(output.dtype), copy=False)
            packed = self.pack(output, part, fmt)
            start = 0
            if output.expert is None and stacked:
                start = expert * (packed.size // count)
            elif row and output.rows_per_row:
                start = row // output.rows_per_row * packed.shape[-1]
            yield OutputChunk(output, start, packed)

    def assemble(
        self,
        weight: Weight,
        fmt: Format,
        outputs: Sequence[OutputTensor],
        read: Callable[[OutputTensor, int, int], Array],
        first: int,
        stop: int,
    ) -> QuantizedTensor:
        """Leading indices (or rows) first..stop of a weight; ``read(output, first, stop)`` gives stored arrays.

        Rows must begin and end at blocks. UnequalScalesError where fused projections have a scale each.
        """
        shape = (stop - first, *weight.shape[1:])
        arrays: dict[str, Array] = {}
        shared: dict[tuple[str, int | None], bytes] = {}
        wanted = fmt.parts(shape)
        for output in outputs:
            if output.part not in wanted or (output.expert is not None and not first <= output.expert < stop):
                continue
            stored = read(output, first, stop)
            if output.part not in arrays:
                # wide scales keep the type that the file has: an FP32 scale is not rounded to BF16
                kind, dims = wanted[output.part]
                arrays[output.part] = np.empty(dims, kind if np.dtype(kind).itemsize == 1 else stored.dtype)
            target = arrays[output.part]
            if target.dtype.itemsize > 1 and target.dtype != stored.dtype:
                raise CheckpointError(f"{output.name} is {stored.dtype}, but others of its kind are {target.dtype}")
            if output.expert is not None:
                target = target[output.expert - first : output.expert - first + 1]
            if output.rows is not None:
                target = target[:, _region(output.rows, output.part, fmt)]
            target[...] = self.unpack(output, stored, fmt, target.shape)
            # fused projections share their scale here, as in the engines
            if not output.rows_per_row:
                content = stored.tobytes()
                if shared.setdefault((output.part, output.expert), content) != content:
                    raise UnequalScalesError(f"{output.name} differs from the scale of the projection it is fused with")
        tensor = QuantizedTensor(fmt, shape, **arrays)
        if self.global_scale_inv and tensor.global_scale is not None:
            tensor.global_scale_inv = tensor.global_scale
            tensor.global_scale = np.asarray(np.float32(1) / tensor.global_scale_inv)
        return tensor


def _part(tensor: QuantizedTensor, part: str) -> Array:
    if part == "global_scale" and tensor.global_scale_inv is not None:
        return tensor.global_scale_inv
    value = getattr(tensor, part)
    if value is None:
        raise PlanError(f"format {tensor.format.name} has no array {part!r}, which the dialect wants to write")
    return np.asarray(value)


def _region(rows: tuple[int, int, int], part: str, fmt: Format) -> slice:
    """Where rows (first, stop, step) of a weight lie in an array of its QuantizedTensor."""
    first, stop, step = rows
    per = fmt.block[0] if part == "scales" else 1
    return slice(first // per, -(-stop // per), step)


_DIALECTS: dict[str, Dialect] = {}


def register_dialect(dialect: Dialect) -> Dialect:
    """Add a dialect to the registry under its name."""
    _DIALECTS[dialect.name] = dialect
    return dialect


def get_dialect(name: str | Dialect) -> Dialect:
    """The dialect of this name; PlanError names the known ones otherwise."""
    if isinstance(name, Dialect):
        return name
    found = _DIALECTS.get(name.replace("_", "-"))
    if found is None:
        raise PlanError(f"unknown dialect {name!r}; known dialects: {', '.join(_DIALECTS)}")
    return found


def list_dialects() -> list[Dialect]:
    """All registered dialects."""
    return list(_DIALECTS.values())
