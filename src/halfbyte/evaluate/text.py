"""The text to measure on, as tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.checkpoint.files import read_small
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.bos import bos_token
from halfbyte.evaluate.settings import TextSettings
from halfbyte.evaluate.windows import PRESETS, Protocol, Window, windows

HELDOUT = "heldout.txt"
MAX_TEXT_BYTES = 1 << 32
"""Tokens of more text would fill the memory."""


@dataclass(frozen=True)
class Passage:
    """Token ids, the windows that are fed to the model, and the protocol that says how they came about.

    ``bos``: the token that takes the place of the first one in every window.
    """

    tokens: list[int]
    windows: list[Window]
    protocol: Protocol
    bos: int | None = None

    def inputs(self, window: Window) -> list[int]:
        """Return what the model sees of a window."""
        tokens = self.tokens[window.start : window.stop]
        return tokens if self.bos is None else [self.bos, *tokens[1:]]


def passage_of(settings: TextSettings, folder: Path | None, tokenizer: Any) -> Passage:
    """Cut a text into windows; without one, that in the checkpoint's ``folder``.

    HalfbyteError where there is no text, or where it is too short.
    """
    preset, length, stride = settings.preset, settings.length, settings.stride
    if preset is not None:
        if preset not in PRESETS:
            raise HalfbyteError(f"unknown protocol {preset!r}; there are {', '.join(PRESETS)}")
        if length is not None or stride is not None:
            raise HalfbyteError(f"the protocol {preset} settles length and stride; leave them out")
    step = PRESETS[preset] if preset else length or 512
    source = find_text(settings.text, folder)
    tokens = tokens_of(source, tokenizer, settings.max_tokens, rows=preset == "wikitext2")
    cut = list(windows(len(tokens), step, stride or step))
    scored = sum(window.stop - window.scored for window in cut)
    digest = sha256_of(tokens)
    bos = bos_token(tokenizer, settings.bos)
    protocol = Protocol(
        source.name,
        step,
        stride or step,
        len(cut),
        scored,
        settings.dtype,
        preset,
        sha256=digest,
        bos=bos is not None,
    )
    return Passage(tokens, cut, protocol, bos)


def sha256_of(tokens: list[int]) -> str:
    """Of token ids as little-endian 64-bit integers."""
    return hashlib.sha256(np.asarray(tokens, dtype="<i8").tobytes()).hexdigest()


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


def tokens_of(path: Path, tokenizer: Any, most: int | None, rows: bool = False) -> list[int]:
    """The first ``most`` tokens of a text, without special tokens.

    ``rows``: the file has a row of a data set in each line; those that are not blank are joined by blank lines.
    """
    try:
        content = read_small(path, MAX_TEXT_BYTES).decode()
    except UnicodeDecodeError as error:
        raise HalfbyteError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    if not content.strip():
        raise HalfbyteError(f"the text {path} is empty")
    if rows:
        content = "\n\n".join(row for row in content.split("\n") if row.strip())
    # a token stands for a few characters; more of a long text need not be looked at, unless this is no usual text
    beginning = content if most is None else content[: max(most * 64, 4096)]
    tokens = tokenizer(beginning, add_special_tokens=False, verbose=False)["input_ids"][:most]
    if most is not None and len(tokens) < most and len(beginning) < len(content):
        tokens = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][:most]
    if len(tokens) < 2:
        raise HalfbyteError(f"the text {path} has {len(tokens)} token(s); at least 2 are needed to predict one")
    return list(tokens)
