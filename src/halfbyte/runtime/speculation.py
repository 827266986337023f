"""Speculation: a draft head guesses the next tokens, and one pass of the model checks all of them.

The pass gives the model's own logits behind every guess. A guess counts only where the caller chooses the same token
from these logits, so the text is the one that the model writes without guesses, sampled or not.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from halfbyte.errors import HalfbyteError
from halfbyte.runtime.draft_head import DraftHead, spelling_of_head
from halfbyte.runtime.kept_modules import speed_up_kept
from halfbyte.source.checkpoint import Checkpoint

MOST_DRAFTS = 8
_PLAIN_EVERY = 12


@dataclass
class DraftCounts:
    """Passes of the model that checked drafts, the drafts in them, how many of these were right, and the time.

    Every twelfth pass is a plain one, for comparison.
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    plain_passes: int = 0
    plain_seconds: float = 0.0

    @property
    def speedup(self) -> float | None:
        """Time of a token without drafts over the time with them; None for an answer too short to compare."""
        if not self.plain_passes or not self.passes:
            return None
        return self.plain_seconds / self.plain_passes * (self.passes + self.accepted) / self.seconds


def check_head(checkpoint: Checkpoint, drafts: int) -> None:
    """HalfbyteError for a number of drafts that nobody uses, CheckpointError for a checkpoint without a head."""
    if not 1 <= drafts <= MOST_DRAFTS:
        raise HalfbyteError(f"the number of drafts must be between 1 and {MOST_DRAFTS}, not {drafts}")
    spelling_of_head(checkpoint)


class Speculation:
    """A model and the draft head of its checkpoint; what both have seen stays cached.

    ``drafts``: how many tokens the head guesses at a time. HalfbyteError for a number that is of no use,
    CheckpointError where the checkpoint has no head.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, drafts: int = 1) -> None:
        check_head(checkpoint, drafts)
        self.model, self.drafts, self.counts = model, drafts, DraftCounts()
        self.head = DraftHead(checkpoint, model)
        speed_up_kept(self.head)
        self._room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        self._forget()

    def _forget(self) -> None:
        self._cache: Any = None
        self._saved: tuple[Any, int] = (None, 0)  # what the cache was before the last pass, and its tokens
        self._fed: list[int] = []  # the tokens that ran through the model, drafts among them
        self._cached = 0  # how many of these the cache holds
        self._logits = torch.empty(0)  # behind the last tokens of _fed
        self._head_cache: Any = DynamicCache()
        self._head_rows = 0  # of tokens that the model has confirmed
        self._hidden = torch.empty(1, 0, 1)  # the model's states from token _head_rows on

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits of the token behind ``ids``, FP32 [V]: those of an earlier pass where its guesses were right."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, self._fed, strict=False)))
        computed = len(self._fed) - len(self._logits)
        if same == len(ids) > computed:
            self.counts.accepted += 1
            return self._logits[same - computed - 1]
        counts, start = self.counts, time.perf_counter()
        # a guess needs the states of all tokens but the last one
        goes_on = 0 < same == len(ids) - 1
        is_plain = goes_on and self._cached == same and counts.passes >= _PLAIN_EVERY * counts.plain_passes + 2
        wanted = 0 if is_plain or not goes_on else min(self.drafts, self._room - len(ids))
        try:
            guesses = self._guess(ids, wanted) if wanted > 0 else []
            self._rewind(min(same, len(ids) - 1))
            self._pass([*ids, *guesses])
        except BaseException:
            self._forget()  # half of a pass is worth nothing
            raise
        if guesses:
            counts.passes, counts.drafted = counts.passes + 1, counts.drafted + len(guesses)
            counts.seconds += time.perf_counter() - start
        elif is_plain:
            counts.plain_passes += 1
            counts.plain_seconds += time.perf_counter() - start
        return self._logits[-len(guesses) - 1]

    def _guess(self, ids: Sequence[int], count: int) -> list[int]:
        """The tokens that the head expects behind ``ids``; the rows of its guesses leave its cache again."""
        head, device = self.head, self._hidden.device
        rows = len(ids) - 1 - self._head_rows
        tokens = torch.tensor([ids[self._head_rows + 1 :]], device=device)
        state, guesses = self._hidden[:, :rows], []
        for number in range(count):
            first = self._head_rows if number == 0 else len(ids) + number - 2
            states = head.run_cached(head.joined(head.embed(tokens), state), first, self._head_cache)
            state, logits = head.states_and_logits(states[:, -1:])
            tokens = logits.argmax(-1)
            guesses.append(int(tokens))
        if count > 1:
            self._head_cache.crop(1 - count)
        self._hidden, self._head_rows = self._hidden[:, rows:], len(ids) - 1
        return guesses

    def _rewind(self, length: int) -> None:
        """Shorten the cache to ``length`` tokens, or to fewer where it can only be put back as it was."""
        if self._cached > length:
            if all(type(layer) is DynamicLayer for layer in self._cache.layers):
                self._cache.crop(length - self._cached)
                self._cached = length
            elif self._saved[1] <= length:
                self._cache, self._cached = self._saved
            else:
                self._cache, self._cached = None, 0
        if self._head_rows > length:  # another conversation
            self._head_cache, self._head_rows, self._hidden = DynamicCache(), 0, self._hidden[:, :0]
            self._cache, self._cached = None, 0

    def _pass(self, tokens: list[int]) -> None:
        """Run all tokens that are not cached through the model; keep its states and its logits."""
        start = self._cached
        if self._cache is not None and not all(type(layer) is DynamicLayer for layer in self._cache.layers):
            self._saved = (_copied(self._cache), start)
        fresh = torch.tensor([tokens[start:]], device=self.model.device)
        states: list[torch.Tensor] = []
        hook = self.model.get_decoder().register_forward_hook(lambda *call: states.append(call[2].last_hidden_state))
        try:
            out = self.model(input_ids=fresh, past_key_values=self._cache, use_cache=True)
        finally:
            hook.remove()
        known = self._hidden[:, : max(start - self._head_rows, 0)]
        new = states[0][:, max(self._head_rows - start, 0) :]
        self._hidden = torch.cat([known, new], 1) if known.numel() else new
        self._cache, self._cached, self._fed = out.past_key_values, len(tokens), tokens
        self._logits = out.logits[0].float()


def _copied(cache: Any) -> Any:
    """A cache that later passes leave as it is: states of linear attention are changed in place, others replaced."""
    result = copy.copy(cache)
    result.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in result.layers:
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                setattr(layer, name, {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in value.items()})
    return result
