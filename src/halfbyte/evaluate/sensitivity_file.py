"""The file of ``halfbyte sensitivity``: JSON lines, a header and groups; an interrupted run leaves its beginning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.files import read_small
from halfbyte.errors import CheckpointError, OutputError

VERSION = 1
ALL = "all"
"""The group of everything that the recipe quantizes, which is measured last."""


def read_sensitivity(path: str | Path) -> dict[str, Any]:
    """Read a sensitivity file as one object: the header with ``groups``, and ``complete``: whether all are there.

    A last line that was torn when its process was killed is left out. OutputError where the file is something else, or
    damaged anywhere but there.
    """
    path = Path(path)
    try:
        lines = read_small(path).split(b"\n")
    except CheckpointError as error:
        raise OutputError(f"there are no sensitivities: {error}") from error
    header = _object(lines[0])
    if header is None or header.get("halfbyte") != "sensitivity" or header.get("version") != VERSION:
        raise OutputError(f"{path} is no sensitivity file of this version; choose another name")
    groups = []
    for number, line in enumerate(lines[1:], 2):
        group = _object(line)
        if group is None and line.strip() and number < len(lines):
            # a run that went on after a torn line began a new one, so that only the group is lost, and measured again
            continue
        if group is not None:
            _check(group, f"{path.name}, line {number}")
            groups.append(group)
    return {**header, "groups": groups, "complete": any(group["group"] == ALL for group in groups)}


def _check(group: dict[str, Any], where: str) -> None:
    """OutputError for a group without a name, weights, format or a finite divergence."""
    kl, weights = group.get("kl"), group.get("weights")
    mean = kl.get("mean") if isinstance(kl, dict) else None
    named = isinstance(group.get("group"), str) and isinstance(group.get("format"), str)
    listed = isinstance(weights, list) and all(isinstance(name, str) for name in weights)
    if not (named and listed and isinstance(mean, (int, float)) and math.isfinite(mean)):
        raise OutputError(
            f"{where} is no measured group: it needs a name, weights, a format and a finite divergence; measure again"
        )


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
