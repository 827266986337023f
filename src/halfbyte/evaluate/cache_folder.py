"""Where references are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """``$HALFBYTE_CACHE``, or ``halfbyte`` in the user's cache folder."""
    if chosen := os.environ.get("HALFBYTE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfbyte"
