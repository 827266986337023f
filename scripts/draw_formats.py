"""Draw docs/images/formats.svg: how 64 weights of a row lie in the main formats, one bit to the same width.

    python scripts/draw_formats.py

Element bits, block sizes, scales and bits per weight come from the formats themselves.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from halfbyte.formats import Format, get_format

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "formats.svg"
WEIGHTS, BIT, ROW = 64, 3.6, 114
LEFT, TOP, BAR, HEAD = 28, 100, 30, 34
WIDTH = round(2 * LEFT + WEIGHTS * 4.5 * BIT)

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #57606a; }
.name { font-size: 15px; font-weight: 600; fill: #1f2328; }
.bits { font-weight: 600; fill: #1f2328; text-anchor: end; }
.in { font-size: 9px; text-anchor: middle; fill: #1f2328; }
.page { fill: #ffffff; }
.fp { fill: #ddf4ff; stroke: #54aeff; }
.int { fill: #dafbe1; stroke: #4ac26b; }
.scale { fill: #ffd8b5; stroke: #fb8f44; }
.select { fill: #cf222e; stroke: #cf222e; }
.micro { fill: #d8b9ff; stroke: #8250df; }
.brace { fill: none; stroke: #8c959f; }
@media (prefers-color-scheme: dark) {
text { fill: #9198a1; }
.name, .bits, .in { fill: #f0f6fc; }
.page { fill: #0d1117; }
.fp { fill: #0c2d6b; stroke: #388bfd; }
.int { fill: #04351a; stroke: #2ea043; }
.scale { fill: #762d0a; stroke: #f0883e; }
.select { fill: #f85149; stroke: #f85149; }
.micro { fill: #4c2889; stroke: #a371f7; }
.brace { stroke: #656c76; }
}
"""


class Drawn(NamedTuple):
    """A format as it is drawn: what its elements are, the fields of its scale word, and a line about the rest."""

    name: str
    title: str
    elements: tuple[str, ...]
    scale: tuple[tuple[str, int, str], ...]
    note: str


FORMATS = (
    Drawn(
        "nvfp4",
        "NVFP4",
        ("fp",),
        (("scale", 8, "E4M3"),),
        "FP4 (E2M1): ±0, 0.5, 1, 1.5, 2, 3, 4, 6. One global scale per matrix, FP32.",
    ),
    Drawn(
        "mixfp4",
        "MixFP4",
        ("fp", "int", "int", "fp"),
        (("select", 1, ""), ("scale", 7, "E4M3")),
        "Bit 7 of the scale byte, the selector, chooses FP4 or the integers −7…7. One global scale per matrix, FP32.",
    ),
    Drawn(
        "mxfp4",
        "MXFP4",
        ("fp",),
        (("scale", 8, "E8M0"),),
        "FP4 (E2M1). The block scale is a power of two. No global scale.",
    ),
    Drawn(
        "int4_g32",
        "INT4, groups of 32",
        ("int",),
        (("scale", 16, "BF16"),),
        "Integers −7…7 (−8 is never written). No global scale.",
    ),
    Drawn(
        "hif4",
        "HiF4",
        ("fp",),
        (("scale", 8, "E6M2"), ("micro", 8, "8 × 1"), ("micro", 16, "16 × 1")),
        "S1P2: ±0, 0.25, … 1.75. The scale word adds one exponent bit per 8 and one per 4 elements. No global scale.",
    ),
)
LEGEND = (
    ("fp", "4-bit float element"),
    ("int", "4-bit integer element"),
    ("scale", "block scale"),
    ("select", "selector"),
    ("micro", "exponent bits"),
)


def picture() -> str:
    """The picture as SVG text."""
    height = TOP + len(FORMATS) * ROW
    label = "How 64 weights are stored in NVFP4, MixFP4, MXFP4, INT4 and HiF4: elements, block scales, bits per weight."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img" aria-label="{label}">',
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>',
            _text(LEFT, 32, "64 consecutive weights of one row", "name"),
            _text(
                LEFT,
                52,
                "Widths are proportional to bits. Files store the scales in a separate array; "
                "the picture puts each scale in front of its block.",
            ),
            *_legend(),
            *(part for row, drawn in enumerate(FORMATS) for part in _row(drawn, TOP + row * ROW)),
            "</svg>",
            "",
        ]
    )


def _legend() -> list[str]:
    parts, x = [], float(LEFT)
    for kind, words in LEGEND:
        parts += [_box(kind, x, 66, 14, 14), _text(x + 20, 78, words)]
        x += 46 + 6.0 * len(words)
    return parts


def _row(drawn: Drawn, y: int) -> list[str]:
    """One format: its name, its blocks with their scales, and what a reader has to know."""
    fmt = get_format(drawn.name)
    columns = fmt.block[1]
    bits = 8 * fmt.nbytes((4096, 4096)) / 4096**2
    width = sum(width for _, width, _ in drawn.scale)
    _check(drawn, fmt, width)
    parts = [
        _text(LEFT, y + 22, drawn.title, "name"),
        _text(WIDTH - LEFT, y + 22, f"4 + {width}/{columns} = {bits:.4g} bits per weight", "bits"),
    ]
    x = float(LEFT)
    for block in range(WEIGHTS // columns):
        start = x
        for kind, wide, label in drawn.scale:
            parts.append(_box(kind, x, y + HEAD, wide * BIT, BAR))
            if label:
                parts.append(_text(x + wide * BIT / 2, y + HEAD + 19, label, "in"))
            x += wide * BIT
        kind = drawn.elements[block % len(drawn.elements)]
        parts += [_box(kind, x + i * 4 * BIT, y + HEAD, 4 * BIT, BAR) for i in range(columns)]
        if drawn.name == "hif4":
            parts += [_brace(x + i * 8 * 4 * BIT, y + HEAD + BAR + 3, 8 * 4 * BIT) for i in range(columns // 8)]
        x += columns * 4 * BIT
        if drawn.name != "hif4":
            parts.append(_brace(start, y + HEAD + BAR + 3, x - start))
        if block == 0:
            parts.append(_text(start, y + HEAD + BAR + 24, f"Block of {columns}. {drawn.note}"))
    return parts


def _check(drawn: Drawn, fmt: Format, width: int) -> None:
    """Refuse a drawing whose scale is not as wide as the format's own."""
    scales, shape = fmt.parts((1, WEIGHTS))["scales"]
    stored = np.dtype(scales).itemsize * 8
    if (stored, shape[-1]) != (width, WEIGHTS // fmt.block[1]):
        raise ValueError(f"{drawn.name}: a block scale has {stored} bits and not the {width} of the drawing")


def _box(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}"/>'


def _brace(x: float, y: float, width: float) -> str:
    return f'<path class="brace" d="M{x + 1:.1f} {y} v4 h{width - 2:.1f} v-4"/>'


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f'<text{attribute} x="{x:.1f}" y="{y}">{escape(words)}</text>'


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
