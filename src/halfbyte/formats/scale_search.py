"""What formats and searches say to each other: the search as a format asks it, and what comes of a block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from halfbyte.formats.arrays import Array, Codes, Floats
from halfbyte.formats.codebooks import Codebook
from halfbyte.formats.losses import Metric


class Encoded(NamedTuple):
    """Blocks as codes uint8 [n, B] (unpacked), stored scales [n], and offsets [n] where the format has them."""

    codes: Codes
    scales: Array
    offsets: Array | None = None


class ScaleSearch(Protocol):
    """What formats and kernels ask of a search; ``halfbyte.search.Search`` says what the parameters mean."""

    @property
    def offsets(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def power_offsets(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def int_ratios(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def float_ratios(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def shrink(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def metric(self) -> Metric: ...  # noqa: D102
    @property
    def rule(self) -> str: ...  # noqa: D102
    @property
    def only(self) -> str: ...  # noqa: D102
    def __hash__(self) -> int: ...
    def single(self, fmt: Any) -> bool: ...  # noqa: D102
    def candidates(self, amax: Floats, codebook: Codebook, fmt: Any) -> Iterator[tuple[Array, Floats]]: ...  # noqa: D102
    def column_candidates(  # noqa: D102
        self, amax: Floats, codebook: Codebook, fmt: Any
    ) -> Iterator[tuple[Array, Floats]]: ...
    def encode_blocks(  # noqa: D102
        self, x: Floats, fmt: Any, global_scale: Floats | None, weight: Floats | None
    ) -> tuple[Codes, Array]: ...


@dataclass
class ColumnChoice:
    """Scales, offsets and codebooks of one block of every row, while GPTQ rounds it column by column."""

    stored: Array
    scale: Floats
    offset: Floats
    codebook: Array
