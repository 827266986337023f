"""Names of an output's files: inside of its folder, and such that every file can be written under a temporary name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from halfbyte.plan.refusal import Refusal

LONGEST = 255 - len(".partial")
"""Bytes that file systems allow for one name, less what an unfinished file has behind its own."""


def check_names(names: Iterable[str]) -> Refusal | None:
    """Refuse names that lead out of a folder, are too long, or cannot be spelled in UTF-8."""
    for name in names:
        pure = PurePosixPath(name)
        if name != str(pure) or pure.is_absolute() or ".." in pure.parts or "\0" in name:
            return Refusal(f"the output would have the file {name[:100]!r}, which is no plain name inside its folder")
        try:
            longest = max(len(part.encode()) for part in pure.parts)
        except UnicodeEncodeError:
            return Refusal(f"the file name {name[:100]!r} is not UTF-8; rename the file")
        if longest > LONGEST:
            return Refusal(
                f"the file name {name[:60]}... has {longest} bytes, and {LONGEST} can be written safely; rename the "
                "file or the recipe"
            )
    return None
