"""Searches by name: which scale codes are tried around the absmax scale, and what error decides.

A search is an object: most are parameters of ``Search``, which compiled code knows. A subclass may add fields and
override ``candidates`` (which scales are tried) or ``encode_blocks`` (how a block is encoded, refinement included);
it runs in NumPy, since kernels take nothing whose class and fields they do not know (``kernels.codec``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from halfbyte.errors import FormatError
from halfbyte.formats import BlockFormat, Codebook, Format
from halfbyte.formats.arrays import Array, Codes, Floats
from halfbyte.formats.losses import SMALLEST, Metric
from halfbyte.kernels import codec
from halfbyte.search import reference

# the first candidate wins ties, so the absmax scale comes first
_WINDOW = (0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -2, -3)
_EVERY = (0, *(o for step in range(1, 126) for o in (step, -step)))


@dataclass(frozen=True)
class Search:
    """How scales are chosen.

    ``offsets`` are steps in scale codes around the base code (ordered scale types); ``int_ratios`` and
    ``float_ratios`` multiply the base scale of wide scale types (BF16, FP32) for integer and float elements;
    ``shrink`` are the factors tried on each end of an affine group's range. ``rule`` names the power-of-two
    rule of E8M0 scales. ``over`` are the magnitudes that Four Over Six maps the block maximum to.
    """

    name: str
    description: str
    offsets: tuple[int, ...] = (0,)
    power_offsets: tuple[int, ...] = (0,)
    int_ratios: tuple[float, ...] = (1.0,)
    float_ratios: tuple[float, ...] = (1.0,)
    shrink: tuple[float, ...] = (1.0,)
    metric: Metric = "sse"
    rule: Literal["floor", "even", "rceil"] = "floor"
    only: Literal["", "e8m0", "four_over_six"] = ""

    def problem(self, fmt: Format) -> str | None:
        """Why this search does not apply to a format, or None."""
        scale = fmt.scale.name if fmt.scale else ""
        if self.only == "e8m0" and scale != "e8m0":
            return f"search {self.name!r} is a rule for power-of-two scales and does not apply to {fmt.name}"
        if self.only == "four_over_six" and not (
            (scale, fmt.has_global_scale) == ("e4m3", True) and any(t.kind == "e2m1" for t in fmt.codebooks)
        ):
            needs = "E2M1 elements, E4M3 scales and a global scale"
            return f"search {self.name!r} needs {needs}, which {fmt.name} does not have"
        return None

    def chooses(self, fmt: Format) -> bool:
        """Whether more than one candidate is tried, so that errors decide."""
        if fmt.offset is not None:
            return len(self.shrink) > 1
        if fmt.scale is None:
            return len(self.offsets) > 1
        if fmt.scale_per_matrix:
            return False
        if len(fmt.codebooks) > 1 or self.only == "four_over_six":
            return True
        if fmt.scale.ordered:
            return len(self.power_offsets if fmt.scale.name == "e8m0" else self.offsets) > 1
        return len(self.int_ratios if fmt.bits == 4 else self.float_ratios) > 1

    def single(self, fmt: Format) -> bool:
        """Whether a block format has a single candidate here, which is taken without being judged."""
        alone = (self.offsets, self.power_offsets) == ((0,), (0,)) and len(fmt.codebooks) == 1
        return alone and self.only != "four_over_six"

    def largest_scale(self) -> float | None:
        """The block scale that a tensor's amax gets, None for the largest that can be stored.

        Four Over Six leaves room for scales 1.5 times larger: 256 instead of 448 (arXiv 2512.02010).
        """
        return 256.0 if self.only == "four_over_six" else None

    def candidates(self, amax: Floats, codebook: Codebook, fmt: BlockFormat) -> Iterator[tuple[Array, Floats]]:
        """Scale codes and values to try for blocks of this (normalised) amax [n]; the first wins ties."""
        return reference.candidates(amax, codebook, fmt, self)

    def column_candidates(self, amax: Floats, codebook: Codebook, fmt: BlockFormat) -> Iterator[tuple[Array, Floats]]:
        """The same for GPTQ, by default the ``candidates``."""
        return reference.column_candidates(amax, codebook, fmt, self)

    def encode_blocks(
        self, x: Floats, fmt: BlockFormat, global_scale: Floats | None, weight: Floats | None
    ) -> tuple[Codes, Array]:
        """Codes [n, B] (unpacked) and stored scales [n] of blocks x FP32 [n, B], each with its global scale.

        By default the best candidate. ``weight`` [n, B] weights squared errors.
        """
        return reference.encode_blocks(x, fmt, self, global_scale, weight)


_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
# 7.5/7 and 7.5/8 meet the largest element exactly, so that decoded values are encoded again without loss
_INT_RATIOS = (1.0, 7.5 / 7, 7.5 / 8, *(round(1.1 - 0.025 * i, 3) for i in range(21) if i != 4))
# the largest element meets each of the eight largest E4M3 values in turn
_FLOAT_RATIOS = tuple(448.0 / v for v in (448, 416, 384, 352, 320, 288, 256, 240))

SEARCHES: dict[str, Search] = {}
"""Searches by name; ``register_search`` adds to them."""


def register_search(search: Search) -> Search:
    """Add a search under its name; FormatError where the name is taken."""
    if search.name in SEARCHES:
        raise FormatError(f"there is a search {search.name!r} already; choose another name")
    SEARCHES[search.name] = search
    return search


for _search in (
    Search("absmax", "the block's largest element meets the codebook's largest value (MX: the OCP floor rule)"),
    Search(
        "sweep",
        "every scale code from -3 to +8 around absmax, with every codebook; the smallest squared error wins",
        _WINDOW,
        (0, 1, -1),
        _INT_RATIOS,
        _FLOAT_RATIOS,
        _SHRINK,
    ),
    Search(
        "exhaustive",
        "every code of an E4M3 or E3M3 scale, five powers of two, otherwise as sweep; slow, a check of the sweep",
        _EVERY,
        (0, 1, -1, 2, -2),
        _INT_RATIOS,
        _FLOAT_RATIOS,
        _SHRINK,
    ),
    Search("four_over_six", "the block maximum to 6 or to 4, by squared error", only="four_over_six"),
    Search("four_over_six_mae", "the same by absolute error", metric="mae", only="four_over_six"),
    Search("four_over_six_absmax", "the same by largest error", metric="max", only="four_over_six"),
    Search(
        "mx_even",
        "MX: floor, plus one where rounding would leave the octave (FP4: from 1.75), as compressed-tensors' MXFP4",
        rule="even",
        only="e8m0",
    ),
    Search("mx_rceil", "MX: the smallest scale that clips nothing, as MLX", rule="rceil", only="e8m0"),
):
    register_search(_search)


def get_search(name: str | Search, fmt: Format | None = None) -> Search:
    """The search of this name, or the object itself; FormatError if it is unknown or does not apply to the format."""
    search = name if isinstance(name, Search) else SEARCHES.get(name)
    if search is None:
        assert isinstance(name, str)
        near = difflib.get_close_matches(name, SEARCHES, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known searches: {', '.join(SEARCHES)}"
        raise FormatError(f"unknown search {name!r}: {hint}")
    problem = search.problem(fmt) if fmt is not None else None
    if problem:
        raise FormatError(f"{problem}; use absmax or sweep")
    return search


def global_scale(amax: Floats, fmt: Format, search: Search, power_of_two: bool = False) -> Floats:
    """FP32 global scale for the given amax (any shape); 1 where amax is zero.

    ``power_of_two`` rounds it up to a power of two, so that code * scale * global scale is exact in BF16.
    """
    amax = np.asarray(amax, dtype=np.float32)
    scale = np.maximum(amax / np.float32(fmt.global_scale_reach(search.largest_scale())), SMALLEST)
    if power_of_two:
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent)).astype(np.float32)
    return np.where(amax == 0, np.float32(1), scale).astype(np.float32)


codec.declare_search(Search)
