"""Sizes as refusals give them."""

from __future__ import annotations


def human(count: int) -> str:
    """Give a number of bytes exactly and rounded: ``4131072 bytes (4.13 MB)``."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{count} bytes" + ("" if unit == "bytes" else f" ({value:.3g} {unit})")
