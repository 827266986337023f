"""Numbers and text as people read and type them."""

from __future__ import annotations

import argparse
import re

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


def clean(text: str, keep: str = "") -> str:
    """The text with control characters spelled out, except those in ``keep``: names come from files, and must not
    steer a terminal."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def size(count: float) -> str:
    """``4.13 GB``: decimal units, three digits."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def exact(count: int) -> str:
    """Give a number of bytes exactly and rounded: ``4,131,072 bytes (4.13 MB)``."""
    return f"{count:,} bytes ({size(count)})" if count >= 1000 else f"{count} bytes"


def duration(seconds: float) -> str:
    """``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def parse_size(text: str) -> int:
    """``5GB``, ``500 MB``, ``4GiB`` or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB, 500MB, 4GiB or a number of bytes")
    return int(float(match[1]) * unit)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)
