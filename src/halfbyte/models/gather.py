"""Per-expert source tensors gathered into one fused weight, with a refusal when any is missing or odd."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Protocol

from halfbyte.errors import CheckpointError
from halfbyte.models.weight import Piece, Weight

_SHOWN = 4


class TensorLike(Protocol):
    """What is needed of a tensor's header entry."""

    @property
    def name(self) -> str:
        """Full name in the checkpoint."""

    @property
    def dtype(self) -> str:
        """Return the element type in safetensors' spelling, e.g. `BF16`."""

    @property
    def shape(self) -> Sequence[int]:
        """Return the dimensions, outermost first."""


class Gather:
    """Collects the per-expert sources of one fused weight.

    `parts` are the names of the row ranges in order, e.g. `("gate", "up")`; `spellings` the source names of
    each part with `{expert}` where the index belongs.
    """

    def __init__(
        self, name: str, role: str, layer: int | None, parts: tuple[str, ...], spellings: tuple[str, ...]
    ) -> None:
        self.name = name
        self.role = role
        self.layer = layer
        self.parts = parts
        self.spellings = spellings
        self.sources: dict[tuple[int, int], TensorLike] = {}

    def weight(self, expected: int | None) -> Weight:
        """The fused weight `[E, sum of the parts' rows, K]`; pieces by expert, then by part.

        `expected` is the number of experts that the config names, if it does. Raises `CheckpointError` with
        the names of missing tensors or of those whose shape or dtype differs.
        """
        experts = max(expert for expert, _ in self.sources) + 1
        self._complete(max(experts, expected or 0))
        if expected is not None and experts > expected:
            extra = self.spellings[0].format(expert=expected)
            raise CheckpointError(f"{extra}: the config names only {expected} experts; correct config.json")
        first = self.sources[0, 0]
        self._alike(first)
        shape = tuple(first.shape)
        if len(shape) != 2:
            raise CheckpointError(f"{first.name}: an expert must have 2 dimensions, not {len(shape)}")
        rows, count = shape[0], len(self.parts)
        ranges = [(part * rows, (part + 1) * rows) if count > 1 else None for part in range(count)]
        pieces = tuple(
            Piece(self.sources[expert, part].name, expert, ranges[part])
            for expert in range(experts)
            for part in range(count)
        )
        row_parts = tuple((part, i * rows, (i + 1) * rows) for i, part in enumerate(self.parts))
        return Weight(
            name=self.name,
            role=self.role,
            layer=self.layer,
            shape=(experts, rows * count, shape[1]),
            dtype=first.dtype,
            pieces=pieces,
            row_parts=row_parts if count > 1 else (),
        )

    def _complete(self, experts: int) -> None:
        if len(self.sources) == experts * len(self.parts):
            return
        count = experts * len(self.parts) - len(self.sources)
        places = ((expert, part) for expert in range(experts) for part in range(len(self.parts)))
        # a number in a name may be 10^17: only the first ones that are missing are looked for
        missing = (self.spellings[part].format(expert=expert) for expert, part in places if self._lacks(expert, part))
        raise CheckpointError(
            f"the experts of {self.name} are incomplete, missing are {_some(list(islice(missing, _SHOWN)), count)}; "
            "download the checkpoint again"
        )

    def _lacks(self, expert: int, part: int) -> bool:
        return (expert, part) not in self.sources

    def _alike(self, first: TensorLike) -> None:
        for what in ("shape", "dtype"):
            value = getattr(first, what)
            odd = [tensor.name for tensor in self.sources.values() if getattr(tensor, what) != value]
            if odd:
                raise CheckpointError(
                    f"the experts of {self.name} cannot be stacked: {first.name} has {what} {value}, "
                    f"but not {_some(odd[:_SHOWN], len(odd))}"
                )


def _some(names: list[str], count: int) -> str:
    rest = f" and {count - len(names)} more" if count > len(names) else ""
    return f"{', '.join(names)}{rest}"
