"""The unit that everything after the inventory works on: one weight, however its source spells it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one source tensor lands inside a `Weight`.

    `expert` is the index on the leading axis, or None when the tensor is the whole weight. `rows` is the
    half-open range of rows that it fills in that expert (or in the 2-D weight), or None for all rows.
    """

    source: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the model with its role; per-expert sources are one fused 3-D weight.

    `shape` is `[..., N, K]` with K the input dimension, `dtype` the safetensors spelling. `group` is the key
    of the fusion group: weights with the same key must share a format and a global scale. `row_parts` names
    the row ranges of a fused projection, e.g. `(("gate", 0, I), ("up", I, 2I))`; when `interleaved`, part p
    of n owns the rows p, p+n, p+2n … instead, and the ranges hold after de-interleaving. `transposed` says
    that the source stores `[..., K, N]`, as gpt-oss does for unquantized experts; `shape` is the stored one.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]
    group: str | None = None
    row_parts: tuple[tuple[str, int, int], ...] = ()
    interleaved: bool = False
    transposed: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the source tensors, in the order of the pieces."""
        return tuple(piece.source for piece in self.pieces)

    def untransposed(self) -> Weight:
        """The same weight with ``shape`` as [..., N, K], also where the source stores [..., K, N]."""
        if not self.transposed:
            return self
        return replace(self, shape=(*self.shape[:-2], self.shape[-1], self.shape[-2]))
