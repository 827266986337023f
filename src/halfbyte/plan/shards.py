"""What lies in which output file: items, the units that stay together, and the exact layout of every file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from typing import Literal

from halfbyte.checkpoint import Layout, nbytes
from halfbyte.dialects import Container, OutputTensor
from halfbyte.formats import Format
from halfbyte.models import Weight
from halfbyte.recipes import Method

# a header entry without its name: dtype, shape and offsets take fewer bytes than this
_ENTRY_BYTES = 128
# a stack of experts has hundreds of tensors of a few kinds
_nbytes = cache(nbytes)


@dataclass(frozen=True, slots=True)
class Item:
    """One weight's fate: ``quantize``, ``transcode``, ``keep``, ``drop`` or ``calibrate``, and its output tensors.

    ``experts``: the leading indices that these outputs hold, where a stack is spread over several files; None
    for all. ``offsets``: where each output starts in its file, absolute; () before it has a place. ``weighted``:
    importance weighs the errors of the search; ``method``: it is rounded with a Hessian. ``declined``: the format that
    the recipe wants and that cannot hold the weight. ``activations``: how the recipe wants the weight's inputs
    quantized. ``fitted``: the global scale is found by SOAR's alternation.
    """

    weight: Weight
    action: str
    reason: str
    format: Format | None = None
    search: str = ""
    power_of_two: bool = False
    outputs: tuple[OutputTensor, ...] = ()
    offsets: tuple[int, ...] = ()
    experts: tuple[int, int] | None = None
    weighted: bool = False
    method: Method | None = None
    declined: str = ""
    activations: Literal["none", "dynamic", "static"] | None = None
    fitted: bool = False
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Count the bytes of the output tensors once."""
        object.__setattr__(self, "nbytes", sum([_nbytes(o.dtype, o.shape) for o in self.outputs]))

    @property
    def indices(self) -> range:
        """Leading indices (rows of a matrix) that the outputs hold."""
        return range(*self.experts) if self.experts else range(self.weight.shape[0])

    @property
    def parameters(self) -> int:
        """Elements of the weight, or of those of its experts that the outputs hold."""
        return len(self.indices) * math.prod(self.weight.shape[1:]) if self.weight.shape else 1

    @property
    def calibrated(self) -> bool:
        """Whether activations decide how the weight is rounded: by a Hessian, or by weighing errors of a search."""
        return self.action == "quantize" and (self.weighted or self.method is not None)

    @property
    def splits(self) -> bool:
        """Whether one source tensor becomes tensors of several modules."""
        return (
            self.action == "quantize"
            and len(self.weight.pieces) == 1
            and any(o.expert is not None for o in self.outputs)
        )


@dataclass(slots=True)
class Shard:
    """An output file: its units (items that share a global scale stay together) and its layout."""

    name: str
    units: list[list[Item]]
    layout: Layout

    @property
    def items(self) -> Iterator[Item]:
        """Its items in file order."""
        return (item for unit in self.units for item in unit)


def make_shards(items: Iterable[Item], limit: int, container: Container | None = None) -> list[Shard]:
    """Files of at most ``limit`` bytes, headers included, in the order of the items; ``container``: safetensors.

    A fusion group is not divided and a tensor cannot be, so either may make a larger file.
    """
    units: dict[str, list[Item]] = {}
    for item in items:
        for part in _parts(item, limit):
            first = part.experts[0] if part.experts else ""
            units.setdefault(item.weight.group or f"={item.weight.name}={first}", []).append(part)
    container = container or Container()
    files: list[list[list[Item]]] = [[]]
    size = container.overhead
    for unit in units.values():
        unit_size = sum(map(_size, unit))
        if files[-1] and size + unit_size > limit:
            files.append([])
            size = 0
        files[-1].append(unit)
        size += unit_size
    total = sum(len(item.outputs) for unit in units.values() for item in unit)
    return [_shard(i, len(files), members, container, total) for i, members in enumerate(files)]


def make_index(shards: list[Shard]) -> bytes | None:
    """The index from tensors to files; None where one file holds all."""
    if len(shards) == 1:
        return None
    names = sorted((o.name, shard.name) for shard in shards for item in shard.items for o in item.outputs)
    total = sum(item.nbytes for shard in shards for item in shard.items)
    # json.dumps with an indent is ten times slower, and this has up to 200,000 lines
    lines = json.dumps(dict(names), separators=(",\n    ", ": "), ensure_ascii=False)[1:-1]
    return f'{{\n  "metadata": {{"total_size": {total}}},\n  "weight_map": {{\n    {lines}\n  }}\n}}\n'.encode()


def _parts(item: Item, limit: int) -> list[Item]:
    """The item, or items of some experts each where the stack is too large for a file and stored by expert."""
    if not item.outputs:
        return []
    size = _size(item)
    if size <= limit or item.outputs[0].expert is None:
        return [item]
    experts = item.weight.shape[0]
    step = max(1, limit * experts // size)
    each = len(item.outputs) // experts
    ranges = [(first, min(first + step, experts)) for first in range(0, experts, step)]
    return [replace(item, outputs=item.outputs[a * each : b * each], experts=(a, b)) for a, b in ranges]


def _size(item: Item) -> int:
    """Bytes of an item in a file, its header entries counted generously."""
    return item.nbytes + sum([len(o.name) + _ENTRY_BYTES for o in item.outputs])


def _shard(number: int, count: int, units: list[list[Item]], container: Container, total: int) -> Shard:
    layout = container.layout(number, count, [o for unit in units for item in unit for o in item.outputs], total)
    offsets = iter(layout.offsets)
    placed = [[replace(item, offsets=tuple(islice(offsets, len(item.outputs)))) for item in unit] for unit in units]
    return Shard(container.name(number, count), placed, layout)
