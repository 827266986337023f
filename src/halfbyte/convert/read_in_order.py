"""The reader of a conversion: where the source is not on this machine, it fetches in the order of the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from halfbyte.checkpoint import Reader
from halfbyte.plan.conversion_plan import Plan
from halfbyte.plan.resources import Limits
from halfbyte.plan.shards import Item, Shard
from halfbyte.source.checkpoint import Checkpoint, pieces_of
from halfbyte.stores.read_ahead import Extent, ReadAhead
from halfbyte.stores.remote import RemoteStore


@contextmanager
def open_reader(plan: Plan, todo: Sequence[Shard], limits: Limits) -> Iterator[Reader]:
    """Open a reader of the source that is about to write ``todo``; it holds at most ``limits.ahead_bytes`` more."""
    inventory = plan.checkpoint.inventory
    if not isinstance(inventory.remote, RemoteStore):
        with Reader(inventory) as reader:
            yield reader
        return
    extents = (extent for shard in todo for item in shard.items for extent in _extents(plan, item))
    with ReadAhead(inventory.remote, extents, limits.ahead_bytes) as ahead, Reader(inventory, ahead) as reader:
        yield reader


def _names(checkpoint: Checkpoint, item: Item) -> list[str]:
    """The source's tensors that hold a weight, or those of its experts that the outputs hold."""
    weight, indices = item.weight, item.indices if item.weight.shape else range(0)
    if weight.name in checkpoint.formats:
        stored = checkpoint.stored(weight)
        if len(weight.shape) > 2 and stored[0].expert is not None:
            each = len(stored) // weight.shape[0]
            stored = stored[indices.start * each : indices.stop * each]
        return [output.name for output in stored]
    if weight.shape and weight.pieces[0].expert is not None:
        return list(dict.fromkeys(piece.source for piece in pieces_of(weight, indices.start, indices.stop)))
    return list(weight.sources)


def _extents(plan: Plan, item: Item) -> Iterator[Extent]:
    """Where the bytes of a weight lie, or those of its experts that the outputs hold."""
    if item.action in ("drop", "calibrate"):
        return
    checkpoint, weight = plan.checkpoint, item.weight
    for name in _names(checkpoint, item):
        info = checkpoint.inventory.tensors.get(name)
        if info is None:
            continue
        offset, size = info.offset, info.nbytes
        if item.experts and info.shape and info.shape[0] == weight.shape[0]:
            row = size // info.shape[0]
            offset, size = offset + item.experts[0] * row, (item.experts[1] - item.experts[0]) * row
        yield info.file, offset, size
