"""Calibration text as samples of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.bos import bos_token
from halfbyte.evaluate.text import tokens_of

BATCH_TOKENS = 4096
Shape = tuple[int, int]
"""Samples in a batch, and tokens in a sample."""


@dataclass(frozen=True)
class Samples:
    """Lists of token ids and what they were made from; ``bos``: each begins with the token that begins a text."""

    tokens: list[list[int]]
    texts: tuple[str, ...]
    bos: bool = False

    @property
    def total(self) -> int:
        """Return the number of tokens of all samples."""
        return sum(map(len, self.tokens))

    def batches(self) -> Iterator[tuple[slice, Shape]]:
        """Rows of all tokens, and the shape [batch, length] of the samples that lie there."""
        length = len(self.tokens[0])
        size = max(1, BATCH_TOKENS // length)
        for i in range(0, len(self.tokens), size):
            count = min(size, len(self.tokens) - i)
            yield slice(i * length, (i + count) * length), (count, length)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the token ids."""
        return hashlib.sha256(json.dumps(self.tokens).encode()).hexdigest()


def make_samples(texts: Sequence[str | Path], tokenizer: Any, count: int, length: int, bos: str = "auto") -> Samples:
    """Cut ``count`` samples of ``length`` tokens, spread evenly over all files together, and the same ones every time.

    ``bos``: whether the token that begins a text takes the place of the first one of each (``halfbyte.evaluate.bos``).

    A file is UTF-8 text, or a ``.json`` of conversations, which go through the tokenizer's chat template.
    HalfbyteError if there is not one whole sample.
    """
    stream: list[int] = []
    for text in map(Path, texts):
        if not text.is_file():
            raise HalfbyteError(f"the calibration text {text} is no file")
        stream += _conversations(text, tokenizer) if text.suffix == ".json" else tokens_of(text, tokenizer, None)
    windows = len(stream) // length
    if not windows:
        raise HalfbyteError(
            f"the calibration text has {len(stream)} tokens, fewer than one sample of {length}; give more text or a "
            "smaller length"
        )
    chosen = [i * windows // min(count, windows) for i in range(min(count, windows))]
    samples = [stream[i * length : (i + 1) * length] for i in chosen]
    token = bos_token(tokenizer, bos)
    if token is not None:
        samples = [[token, *sample[1:]] for sample in samples]
    return Samples(samples, tuple(Path(t).name for t in texts), token is not None)


def _conversations(path: Path, tokenizer: Any) -> list[int]:
    from halfbyte.evaluate.conversations import read_conversations, render

    if not getattr(tokenizer, "chat_template", None):
        raise HalfbyteError(f"the tokenizer has no chat template, so {path} cannot be spelled; pass a text")
    rendered = (render(messages, tokenizer) for messages in read_conversations(path) if messages)
    return [token for ids in rendered if ids for token in ids]
