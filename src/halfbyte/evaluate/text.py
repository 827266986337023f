"""The text to measure on, as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError

HELDOUT = "heldout.txt"


def find_text(text: str | Path | None, folder: Path | None) -> Path:
    """The file to measure on: ``text``, or the held-out text that travels with the demo model and its offspring."""
    if text is not None:
        path = Path(text)
        if not path.is_file():
            raise HalfbyteError(f"the text {path} is no file; pass the path of a UTF-8 text")
        return path
    if folder is not None and (folder / HELDOUT).is_file():
        return folder / HELDOUT
    raise HalfbyteError(
        "there is no text to measure on; pass one (--text FILE, any UTF-8 file that the model has not been "
        "calibrated on). Only the bundled demo model brings its own"
    )


def tokens_of(path: Path, tokenizer: Any, most: int | None) -> list[int]:
    """The first ``most`` tokens of a text, without special tokens."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HalfbyteError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    if not content.strip():
        raise HalfbyteError(f"the text {path} is empty")
    # a token stands for a few characters; more of a long text need not be looked at, unless this is no usual text
    beginning = content if most is None else content[: max(most * 64, 4096)]
    found = tokenizer(beginning, add_special_tokens=False, verbose=False)["input_ids"][:most]
    if most is not None and len(found) < most and len(beginning) < len(content):
        found = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][:most]
    if len(found) < 2:
        raise HalfbyteError(f"the text {path} has {len(found)} token(s); at least 2 are needed to predict one")
    return list(found)
