"""How a text is cut into windows so that every token is scored once, and how to say so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from halfbyte.errors import HalfbyteError

PRESETS = {"wikitext2": 2048, "chunks-512": 512}
"""Named protocols: the length of their windows, which do not overlap."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens start..stop are the model's input; of these, scored..stop are predicted and counted."""

    start: int
    stop: int
    scored: int

    @property
    def size(self) -> int:
        """Return the number of input tokens."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Protocol:
    """What a perplexity or a divergence depends on besides the model. ``tokens`` are the scored ones.

    ``sha256`` is that of the token ids, 8 bytes each. ``kind`` is "text" or "conversations"; of conversations,
    ``windows`` is the number of those used and ``skipped`` says why others were not. ``bos``: the first token of every
    window is the one that begins a text.
    """

    text: str
    length: int
    stride: int
    windows: int
    tokens: int
    dtype: str
    preset: str | None = None
    kind: str = "text"
    sha256: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    bos: bool = False

    def __str__(self) -> str:
        if self.kind == "conversations":
            left = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            return (
                f"{self.text}: {self.tokens:,} tokens scored in {self.windows:,} conversations of {self.length} tokens"
                f"{f' (skipped: {left})' if left else ''}, through the chat template, {self.dtype}"
            )
        special = "BOS first in each" if self.bos else "no special tokens"
        return (
            f"{self.text}: {self.tokens:,} tokens scored in {self.windows:,} windows of {self.length}, "
            f"stride {self.stride}, {special}, {self.dtype}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the sentence as JSON holds them."""
        return {**asdict(self), "note": str(self)}


def windows(tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Windows over a text of ``tokens`` tokens; the first token of all, or of a window without overlap, is not scored.

    With ``stride`` < ``length`` windows overlap: each scores only tokens that no earlier one has scored, with
    at least ``length - stride`` tokens before them.
    """
    if length < 2:
        raise HalfbyteError(f"a window of {length} tokens predicts nothing; the length must be at least 2")
    if not 1 <= stride <= length:
        raise HalfbyteError(f"stride {stride} is not between 1 and the length {length}; tokens would be skipped")
    done = 0
    for start in range(0, tokens, stride):
        stop = min(start + length, tokens)
        scored = max(done, start + 1)
        if scored < stop:
            yield Window(start, stop, scored)
        done = stop
        if stop == tokens:
            return


def batches(cut: list[Window], most: int) -> Iterator[list[int]]:
    """Indices of windows of equal length, of at most ``most`` tokens together (but at least one window)."""
    batch: list[int] = []
    for index, window in enumerate(cut):
        if batch and ((len(batch) + 1) * window.size > most or window.size != cut[batch[0]].size):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
