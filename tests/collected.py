"""Statistics as a calibration collects them, with keys and values that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from halfbyte.calibration.statistics import Part, new_description, write_description, write_part
from halfbyte.source.checkpoint import Checkpoint


def with_caches(folder: Path, source: Path, caches: Mapping[str, Mapping[str, float]]) -> Path:
    """Statistics of a checkpoint; ``caches``: ``keys`` and ``values`` by attention module; all else is 1."""
    part = Part()
    for weight in Checkpoint.open(source).weights:
        if len(weight.shape) < 2 or weight.role.startswith("mtp."):
            continue
        lead = weight.shape[:1] if len(weight.shape) == 3 and "experts" in weight.role else ()
        part.arrays[weight.name] = {
            "count": np.ones(lead, np.int64),
            "squares": np.ones((*lead, weight.shape[-1])),
            "amax": np.ones(lead, np.float32),
        }
    for module, kinds in caches.items():
        part.arrays[module] = {kind: np.array(value, np.float32) for kind, value in kinds.items()}
    folder.mkdir()
    write_part(folder, "all", part)
    write_description(
        folder, new_description(texts=[], samples=1, tokens=1, caches=True, parts=["all"]) | {"complete": True}
    )
    return folder
