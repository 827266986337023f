"""Rows of q and k in llama.cpp's order, in which the two halves of a head alternate, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from halfbyte.dialects.gguf_models import Model
from halfbyte.dialects.outputs import Array, OutputChunk, OutputTensor


class RowOrder(NamedTuple):
    """The order of rows in the files of a model. ``heads``: of attention, for queries and for keys."""

    model: Model
    heads: tuple[int, int]

    def head(self, name: str, rows: int) -> int:
        """Return the rows of a head of a tensor whose rows llama.cpp has in another order, else 0."""
        if self.model.permuted:
            for part, count in zip((".attn_q.", ".attn_k."), self.heads, strict=True):
                if part in name:
                    return rows // count
        return 0

    def place(self, output: OutputTensor, part: Array, first: int) -> Iterator[OutputChunk]:
        """Put leading indices from ``first`` on where llama.cpp looks for them: in place, or in its order of a head."""
        width = part.size // len(part)
        head = self.head(output.name, output.shape[0])
        if not head:
            yield OutputChunk(output, first * width, part)
            return
        places = permuted(np.arange(first, first + len(part)), head)
        if first % head == 0 and len(part) % head == 0:
            whole = np.empty_like(part)
            whole[places - first] = part
            yield OutputChunk(output, first * width, whole)
            return
        for place, values in zip(places.tolist(), part, strict=True):
            yield OutputChunk(output, place * width, values)

    def take(self, name: str, rows: int, read: Callable[[int, int], Array], first: int, stop: int) -> Array:
        """Read leading indices first..stop of a tensor in the order of its source, by whole heads."""
        head = self.head(name, rows)
        if not head:
            return read(first, stop)
        begin, end = first // head * head, -(-stop // head) * head
        return read(begin, end)[permuted(np.arange(first, stop), head) - begin]


def permuted(rows: Array, head: int) -> Array:
    """Map rows of q or k to their places in llama.cpp's order: both halves of a head alternate."""
    within = rows % head
    return rows - within + within % (head // 2) * 2 + within // (head // 2)
