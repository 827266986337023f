"""Which sources cannot be written in any other form, whatever the recipe."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from halfbyte.checkpoint.files import open_regular
from halfbyte.errors import CheckpointError
from halfbyte.plan.refusal import Refusal
from halfbyte.source.checkpoint import Checkpoint
from halfbyte.source.unread import likely_method, unread_codes, unread_method, without_language_model


def check_readable(root: Path | None, names: Iterable[str]) -> Refusal | None:
    """Refuse files that are to be copied and cannot be opened, before hours of work and not after them."""
    if root is None:
        return None
    for name in names:
        try:
            os.close(open_regular(root / name)[0])
        except CheckpointError as error:
            return Refusal(f"{error}; make it readable or move it out of the folder", CheckpointError)
    return None


def check_source(checkpoint: Checkpoint) -> Refusal | None:
    """Refuse sources that no dialect reads, and those whose configuration cannot be written in another form."""
    source, dialect = checkpoint.inventory.source, checkpoint.dialect
    method = unread_method(checkpoint)
    if method:
        return Refusal(f"{source} is quantized by {method[:80]!r}, which cannot be read; start from another source")
    first = next(unread_codes(checkpoint), None)
    if first is not None:
        guess = likely_method(checkpoint)
        like = f", as of {guess}," if guess else ""
        says = "its quantization_config does not cover them" if dialect else "config.json does not say how they are"
        return Refusal(
            f"{first.name} in {source} holds packed codes ({first.dtype}){like} but {says}"
            f"{'' if dialect else ' quantized'}; restore its quantization_config or start from another source"
        )
    if dialect and dialect.package.standalone:
        return Refusal(
            f"{source} is in the dialect {dialect.name}, which inspect and verify read, but its "
            "configuration and tokenizer cannot be written in another form; start from the original checkpoint"
        )
    if without_language_model(checkpoint):
        return Refusal(f"{source} holds a vision model and no language model, so there is nothing to quantize")
    return None
