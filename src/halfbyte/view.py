"""The old name of ``halfbyte.source.checkpoint``; it goes with release 0.2."""

from halfbyte.source.checkpoint import Checkpoint

__all__ = ["Checkpoint"]
