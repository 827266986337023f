"""Text as batches of token ids: the same ones for a seed, whatever was interrupted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.text import tokens_of

HELD_OUT = 16
"""Sequences of the text's end that choose the best step, unless a text of their own is given; at most a tenth."""


@dataclass
class TokenBatches:
    """Sequences [count, length] to train on, and others, ``held_out``, that choose the best step."""

    sequences: torch.Tensor
    held_out: torch.Tensor
    batch_size: int
    seed: int

    def batch(self, step: int) -> torch.Tensor:
        """The batch of a step (from 0): a new order of all sequences in every epoch, which depends on the seed only."""
        return self.sequences[[self._place(step * self.batch_size + i) for i in range(self.batch_size)]]

    def _place(self, number: int) -> int:
        epoch, within = divmod(number, len(self.sequences))
        return int(_order(self.seed, epoch, len(self.sequences))[within])

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all tokens and of how they are drawn."""
        digest = hashlib.sha256(f"{tuple(self.sequences.shape)} {self.batch_size} {self.seed}".encode())
        digest.update(self.sequences.numpy().tobytes() + self.held_out.numpy().tobytes())
        return digest.hexdigest()


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def make_batches(
    texts: Sequence[str | Path],
    tokenizer: Any,
    length: int = 512,
    batch_size: int = 1,
    seed: int = 0,
    held_out: Sequence[str | Path] = (),
    vocabulary: int | None = None,
) -> TokenBatches:
    """Cut texts into sequences of ``length`` tokens; the end of the text is held out where no text is given for it.

    HalfbyteError for a text that is none, without a sequence for each purpose, or with tokens beyond ``vocabulary``.
    """
    sequences = _sequences(texts, tokenizer, length, vocabulary, "text")
    if held_out:
        return TokenBatches(
            sequences, _sequences(held_out, tokenizer, length, vocabulary, "held-out text"), batch_size, seed
        )
    count = min(HELD_OUT, max(1, len(sequences) // 10))
    if len(sequences) < 2:
        raise HalfbyteError(
            f"the text has {len(sequences)} sequence of {length} tokens, and one is held out; give more text, a "
            "smaller length, or a held-out text"
        )
    return TokenBatches(sequences[:-count], sequences[-count:], batch_size, seed)


def _sequences(
    texts: Sequence[str | Path], tokenizer: Any, length: int, vocabulary: int | None, what: str
) -> torch.Tensor:
    stream: list[int] = []
    for path in map(Path, texts):
        if not path.is_file():
            raise HalfbyteError(f"the {what} {path} is no file; pass the path of a UTF-8 text")
        stream += tokens_of(path, tokenizer, None)
    count = len(stream) // length
    if not count:
        raise HalfbyteError(
            f"the {what} has {len(stream)} tokens, fewer than one sequence of {length}; give more text or a smaller "
            "length"
        )
    if vocabulary is not None and max(stream) >= vocabulary:
        raise HalfbyteError(f"the tokenizer gives token {max(stream)}, but the model has only {vocabulary}")
    return torch.tensor(stream[: count * length], dtype=torch.int64).reshape(count, length)
