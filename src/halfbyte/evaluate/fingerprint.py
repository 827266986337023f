"""What tells one checkpoint from another: a hash of its contents."""

from __future__ import annotations

import hashlib

from halfbyte.errors import CheckpointError
from halfbyte.source.checkpoint import Checkpoint

_PIECE = 16 << 20


def content_hash(checkpoint: Checkpoint) -> str:
    """SHA-256 over config.json and the contents of all weight files, in the order of their names."""
    root = checkpoint.inventory.root
    if root is None:
        raise CheckpointError(f"{checkpoint.inventory.source} is an inventory without weights, so nothing can be run")
    total = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE))
    for name in sorted({*checkpoint.inventory.files, "config.json"}):
        if name == "config.json" and not (root / name).exists():
            continue
        digest = hashlib.sha256()
        with (root / name).open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
        total.update(f"{name}\0{digest.hexdigest()}\n".encode())
    return total.hexdigest()
