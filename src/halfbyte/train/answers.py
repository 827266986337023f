"""How long generated answers are: what distillation breaks in practice when losses look fine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from halfbyte.train.student import rounded_once


@dataclass(frozen=True)
class Answers:
    """Mean length in tokens of greedy answers, and the share of them that ran into the limit."""

    prompts: int
    limit: int
    mean_length: float
    at_limit: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def measure_answers(model: Any, prompts: torch.Tensor, limit: int = 64) -> Answers:
    """Continue prompts [count, length] greedily until the model ends its text, at most by ``limit`` tokens."""
    ends = _ends(model)
    lengths = []
    device = next(model.parameters()).device
    with rounded_once(model):
        for prompt in prompts.to(device):
            out = model.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                max_new_tokens=limit,
                do_sample=False,
                pad_token_id=ends[0] if ends else 0,
            )[0, len(prompt) :].tolist()
            lengths.append(next((i for i, token in enumerate(out) if token in ends), limit))
    count = len(lengths)
    return Answers(count, limit, sum(lengths) / count, sum(length == limit for length in lengths) / count)


def _ends(model: Any) -> list[int]:
    """Tokens that end a text."""
    given = getattr(model.generation_config, "eos_token_id", None)
    given = model.config.get_text_config().eos_token_id if given is None else given
    return [] if given is None else [given] if isinstance(given, int) else list(given)
