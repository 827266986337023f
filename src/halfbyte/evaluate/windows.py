"""How a text is cut into windows so that every token is scored once, and how to say so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from halfbyte.errors import HalfbyteError


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens start..stop are the model's input; of these, scored..stop are predicted and counted."""

    start: int
    stop: int
    scored: int


@dataclass(frozen=True, slots=True)
class Protocol:
    """What a perplexity depends on besides the model. ``tokens`` are the scored ones."""

    text: str
    length: int
    stride: int
    windows: int
    tokens: int
    dtype: str

    def __str__(self) -> str:
        return (
            f"{self.text}: {self.tokens:,} tokens scored in {self.windows:,} windows of {self.length}, "
            f"stride {self.stride}, no special tokens, {self.dtype}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


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
