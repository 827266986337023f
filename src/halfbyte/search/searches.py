"""Searches by name: which scale codes are tried around the absmax scale, and what error decides."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from halfbyte.errors import FormatError
from halfbyte.formats import AffineFormat, BlockFormat, Format

Metric = Literal["sse", "mae", "max"]

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
    about: str
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
        scale = fmt.scale.name if isinstance(fmt, BlockFormat) else ""
        if self.only == "e8m0" and scale != "e8m0":
            return f"search {self.name!r} is a rule for power-of-two scales and does not apply to {fmt.name}"
        if self.only == "four_over_six" and not (
            isinstance(fmt, BlockFormat)
            and (scale, fmt.has_global_scale) == ("e4m3", True)
            and any(t.kind == "e2m1" for t in fmt.codebooks)
        ):
            needs = "E2M1 elements, E4M3 scales and a global scale"
            return f"search {self.name!r} needs {needs}, which {fmt.name} does not have"
        return None

    def chooses(self, fmt: Format) -> bool:
        """Whether more than one candidate is tried, so that errors decide."""
        if isinstance(fmt, AffineFormat):
            return len(self.shrink) > 1
        if not isinstance(fmt, BlockFormat):
            return len(self.offsets) > 1
        if fmt.block == (-1, -1):
            return False
        if len(fmt.codebooks) > 1 or self.only == "four_over_six":
            return True
        if fmt.scale.ordered:
            return len(self.power_offsets if fmt.scale.name == "e8m0" else self.offsets) > 1
        return len(self.int_ratios if fmt.bits == 4 else self.float_ratios) > 1


_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
# 7.5/7 and 7.5/8 meet the largest element exactly, so that decoded values are encoded again without loss
_INT_RATIOS = (1.0, 7.5 / 7, 7.5 / 8, *(round(1.1 - 0.025 * i, 3) for i in range(21) if i != 4))
# the largest element meets each of the eight largest E4M3 values in turn
_FLOAT_RATIOS = tuple(448.0 / v for v in (448, 416, 384, 352, 320, 288, 256, 240))

SEARCHES = {
    search.name: search
    for search in (
        Search("absmax", "the block's largest element meets the table's largest value (MX: the OCP floor rule)"),
        Search(
            "sweep",
            "every scale code from -3 to +8 around absmax, with every table; the least squared error wins",
            _WINDOW,
            (0, 1, -1),
            _INT_RATIOS,
            _FLOAT_RATIOS,
            _SHRINK,
        ),
        Search(
            "exhaustive",
            "every code of an E4M3 or E3M3 scale, five powers of two, otherwise as sweep: slow, to judge the sweep",
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
    )
}


def get_search(name: str, fmt: Format | None = None) -> Search:
    """The search of this name; FormatError if it is unknown or does not apply to the format."""
    found = SEARCHES.get(name)
    if found is None:
        near = difflib.get_close_matches(name, SEARCHES, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known searches: {', '.join(SEARCHES)}"
        raise FormatError(f"unknown search {name!r}: {hint}")
    problem = found.problem(fmt) if fmt is not None else None
    if problem:
        raise FormatError(f"{problem}; use absmax or sweep")
    return found


__all__ = ["SEARCHES", "AffineFormat", "Metric", "Search", "get_search"]
