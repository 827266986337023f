"""halfbyte.json: what an output was made of, and the SHA-256 of every file beside it and of itself.

All hashes have a fixed length, so its size is known before a weight is read. The last line holds the hash of the
file itself, computed with zeros in the place of that hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from halfbyte.errors import VerifyError

UNKNOWN = "0" * 64
"""Stands for a hash that is not known yet."""
VERSION = 3
"""Of the file; releases before wrote 1 and 2, without hashes."""
REQUIRED = frozenset({"halfbyte", "source", "dialect", "recipe", "plan", "files", "sha256"})
KEYS = REQUIRED | {"importance", "folds", "rounded_with_hessian"}


def spell(
    origin: Mapping[str, Any], plan: str, sizes: Mapping[str, int], hashes: Mapping[str, str], source: str
) -> bytes:
    """The file. ``origin``: what the output is made of; ``plan``: the plan's fingerprint; ``sizes`` and ``hashes`` by
    file name, where a hash may be missing; ``source``: the digest of the source's samples."""
    files = {name: {"bytes": sizes[name], "sha256": hashes.get(name, UNKNOWN)} for name in sorted(sizes)}
    content = {**origin, "source": {**origin["source"], "sample": source}, "plan": plan, "files": files}
    return seal(content)


def seal(content: Mapping[str, Any]) -> bytes:
    """The file with the hash of itself as the last entry."""
    open_text = _text({**content, "sha256": UNKNOWN})
    return _text({**content, "sha256": hashlib.sha256(open_text).hexdigest()})


def is_sealed(data: bytes) -> bool:
    """Whether the file is what was written, to the last bit."""
    try:
        content = json.loads(data)
        return isinstance(content, dict) and data == seal({k: v for k, v in content.items() if k != "sha256"})
    except (ValueError, RecursionError):
        return False


def check_keys(content: Mapping[str, Any], where: str) -> None:
    """VerifyError for keys that this release does not write, or that it never leaves out."""
    version = content.get("halfbyte")
    if version in (1, 2):
        unknown = set(content) - (KEYS - {"plan", "files", "sha256"})
        missing: set[str] = set()
    else:
        unknown, missing = set(content) - KEYS, set(REQUIRED - set(content))
    if type(version) is not int or not 1 <= version <= VERSION or unknown or missing:
        what = f"the unknown key {sorted(unknown)[0]!r}" if unknown else "a version that this release does not know"
        if missing and not unknown:
            what = f"no key {sorted(missing)[0]!r}"
        raise VerifyError(f"{where} has {what}, so it is damaged or of a newer release; convert again")


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
