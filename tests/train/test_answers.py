"""Lengths of generated answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import halfbyte
from halfbyte.train.answers import measure_answers


def test_answers_end_at_the_models_own_end_or_at_the_limit(saved: Callable[[str], Path]) -> None:
    model = halfbyte.load(saved("qwen3"), "float32")
    prompts = torch.randint(3, 96, (3, 8), generator=torch.manual_seed(0))
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    free = measure_answers(model, prompts, 12)
    assert (free.mean_length, free.at_limit, free.limit, free.prompts) == (12, 1.0, 12, 3)
    out = model.generate(prompts[:1], attention_mask=torch.ones_like(prompts[:1]), max_new_tokens=12, do_sample=False)
    model.generation_config.eos_token_id = int(out[0, 8 + 4])
    ended = measure_answers(model, prompts[:1], 12)
    assert ended.mean_length <= 4 and ended.at_limit == 0
