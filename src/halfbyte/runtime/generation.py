"""Text from a model, token by token: a decode loop that does nothing but run the model and choose a token."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.runtime.speculation import DraftCounts, Speculation
from halfbyte.runtime.templates import apply_template

_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest one where ``temperature`` is 0, else at random among the likeliest.

    ``top_k`` (0: all) and ``top_p`` limit the choice; ``seed`` makes it repeatable. An answer ends at one of the
    ``stop`` strings, which is no part of it, at the model's end token, or after ``max_tokens``.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fits = self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0 and self.max_tokens > 0
        if not fits or not all(self.stop):
            raise HalfbyteError(
                "sampling needs a temperature and top_k of 0 or more, top_p above 0 and up to 1, at least one token "
                "and no empty stop strings"
            )


@dataclass
class Counts:
    """What an answer took: tokens and seconds of the prompt and of what followed; ``finish``: stop or length.

    With a draft head, ``drafts`` counts its guesses.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    finish: str = "length"
    drafts: DraftCounts | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens behind the first, which the prompt's pass gives."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds else 0.0


@dataclass
class Generator:
    """A model and its tokenizer. What both have seen stays cached, so that a longer conversation goes on from there.

    With ``speculation``, a draft head guesses tokens: the same text in fewer passes of the model.
    """

    model: Any
    tokenizer: Any
    speculation: Speculation | None = None
    counts: Counts = field(default_factory=Counts)
    _cache: Any = None
    _cached: list[int] = field(default_factory=list)

    def chat(self, messages: Sequence[dict[str, str]], sampling: Sampling) -> Iterator[str]:
        """Yield the answer to a conversation, piece by piece; HalfbyteError without a chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise HalfbyteError("the tokenizer has no chat template; use `halfbyte generate` with a prompt")
        text = apply_template(self.tokenizer, messages, tokenize=False, add_generation_prompt=True)
        # the template spells the special tokens itself
        return self.continue_tokens(self.tokenizer(text, add_special_tokens=False)["input_ids"], sampling)

    def complete(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Yield what follows a text, piece by piece."""
        return self.continue_tokens(self.tokenizer(prompt)["input_ids"], sampling)

    def continue_tokens(self, ids: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """Yield what follows tokens, piece by piece; ``counts`` tells afterwards what it took."""
        if not ids:
            raise HalfbyteError("there is nothing to continue: the prompt has no tokens")
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if room and len(ids) >= room:
            raise HalfbyteError(f"the prompt has {len(ids)} tokens, and the model has {room} positions")
        limit = min(sampling.max_tokens, room - len(ids)) if room else sampling.max_tokens
        self.counts = Counts(prompt_tokens=len(ids))
        return self._text(list(ids), limit, sampling)

    def _text(self, ids: list[int], limit: int, sampling: Sampling) -> Iterator[str]:
        """Tokens as text: nothing of an unfinished character, and nothing that may become a stop string."""
        tokens: list[int] = []
        shown = 0
        longest = max(map(len, sampling.stop), default=0)
        text = ""
        for token in self._tokens(ids, limit, sampling):
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            ends = [at for stop in sampling.stop if (at := text.find(stop, max(0, shown - longest))) >= 0]
            if ends:
                self.counts.finish = "stop"
                text = text[: min(ends)]
                break
            if text.endswith(_UNFINISHED):
                continue
            safe = len(text) - _held_back(text, sampling.stop)
            if safe > shown:
                yield text[shown:safe]
                shown = safe
        if text[shown:]:
            yield text[shown:]

    def _tokens(self, ids: list[int], limit: int, sampling: Sampling) -> Iterator[int]:
        """Token after token until the model's end token, which is not given."""
        random = None
        if sampling.temperature:
            random = torch.Generator()
            random.manual_seed(torch.seed() if sampling.seed is None else sampling.seed)
        ends = self._end_tokens()
        next_logits = self._logits
        if self.speculation is not None:
            self.counts.drafts = self.speculation.counts = DraftCounts()
            next_logits = self.speculation.logits
        start = time.perf_counter()
        for number in range(limit):
            token = _choose(next_logits(ids), sampling, random)
            now = time.perf_counter()
            if number == 0:
                self.counts.prompt_seconds, start = now - start, now
            self.counts.seconds = now - start
            if token in ends:
                self.counts.finish = "stop"
                return
            ids.append(token)
            self.counts.tokens += 1
            yield token

    @torch.inference_mode()
    def _logits(self, ids: list[int]) -> torch.Tensor:
        """Logits of the token behind ``ids``, FP32 [V]; only tokens that are not cached run through the model."""
        known = len(self._cached)
        if self._cache is None or known >= len(ids) or ids[:known] != self._cached:
            self._cache, known = None, 0
        fresh = torch.tensor([ids[known:]], device=self.model.device)
        few = {"logits_to_keep": 1} if _keeps_logits(self.model) else {}
        cache, self._cache = self._cache, None  # an interrupted pass leaves it half changed
        out = self.model(input_ids=fresh, past_key_values=cache, use_cache=True, **few)
        self._cache, self._cached = out.past_key_values, list(ids)
        logits: torch.Tensor = out.logits[0, -1].float()
        return logits

    def _end_tokens(self) -> set[int]:
        stated = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        tokens = {self.tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])}
        return {token for token in tokens if token is not None}


def _held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    lengths = [n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])]
    return max(lengths, default=0)


def _choose(logits: torch.Tensor, sampling: Sampling, random: torch.Generator | None) -> int:
    if random is None:
        return int(logits.argmax())
    values, order = (logits.cpu() / sampling.temperature).sort(descending=True)
    if sampling.top_k:
        values, order = values[: sampling.top_k], order[: sampling.top_k]
    shares = values.softmax(0)
    # the first token always stays
    likely = shares.cumsum(0) - shares < sampling.top_p
    return int(order[torch.multinomial(shares * likely, 1, generator=random)])


def _keeps_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters
