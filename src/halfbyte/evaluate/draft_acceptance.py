"""How many tokens of a checkpoint's own multi-token-prediction head its model accepts.

The model continues prompts greedily. At every position of what it wrote, the head drafts k tokens from the state that
the model had there, as an engine does when it speculates; a draft counts while all before it are right, since an
engine throws away what follows a wrong one. Greedy decoding accepts a draft exactly if the model would have written
it, so the numbers are those of an engine at temperature 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.runtime.draft_head import DraftHead
from halfbyte.runtime.speculation import check_head
from halfbyte.source.checkpoint import Checkpoint

PROMPTS, PROMPT_LENGTH, CONTINUATION = 16, 64, 64


@torch.no_grad()
def measure_drafts(
    model: Any, checkpoint: Checkpoint, tokens: list[int], drafts: int, bos: int | None = None
) -> dict[str, Any]:
    """Acceptance of 1..``drafts`` drafted tokens on continuations of prompts that are cut from ``tokens``.

    ``bos`` takes the place of each prompt's first token.

    Returns ``accepted`` (the share of positions at which the first k drafts are all right, k = 1..drafts),
    ``tokens_per_step`` (what a step of the model then yields), ``positions``, and how it was measured.
    """
    check_drafts([checkpoint], drafts)
    head = DraftHead(checkpoint, model)
    prompts = prompts_of(tokens)
    if bos is not None:
        prompts[:, 0] = bos
    prompts = prompts.to(next(model.parameters()).device)
    written = continue_greedily(model, prompts, CONTINUATION)
    right = torch.cat([_right_drafts(head, model, row[None], prompts.shape[1], drafts) for row in written])
    accepted = [round(float((right >= k).double().mean()), 4) for k in range(1, drafts + 1)]
    return {
        "accepted": accepted,
        "tokens_per_step": round(1 + sum(accepted), 4),
        "positions": len(right),
        "prompts": len(prompts),
        "prompt_length": prompts.shape[1],
        "continuation": CONTINUATION,
    }


def check_drafts(checkpoints: Iterable[Checkpoint], drafts: int) -> None:
    """HalfbyteError for a number of drafts that nobody uses, CheckpointError for a checkpoint without a head."""
    for checkpoint in checkpoints:
        check_head(checkpoint, drafts)


def prompts_of(tokens: list[int]) -> torch.Tensor:
    """Prompts [B, T] from evenly spaced places; HalfbyteError where the text is too short for two."""
    count = min(PROMPTS, len(tokens) // PROMPT_LENGTH)
    if count < 2:
        raise HalfbyteError(f"a text of {len(tokens)} tokens is too short to draft on; give one of a few thousand")
    step = (len(tokens) - PROMPT_LENGTH) // (count - 1)
    return torch.tensor([tokens[i * step : i * step + PROMPT_LENGTH] for i in range(count)])


def continue_greedily(model: Any, prompts: torch.Tensor, count: int) -> torch.Tensor:
    """Prompts [B, T] and the ``count`` tokens after each that the model finds most likely: [B, T + count]."""
    written, cache, fed = prompts, None, prompts
    for _ in range(count):
        output = model(input_ids=fed, past_key_values=cache, use_cache=True)
        cache, fed = output.past_key_values, output.logits[:, -1:].argmax(-1)
        written = torch.cat([written, fed], 1)
    return written


def _right_drafts(head: DraftHead, model: Any, tokens: torch.Tensor, begin: int, drafts: int) -> torch.Tensor:
    """How many drafts in a row are right, at each position from which all of them fall into tokens[:, begin:].

    All positions are drafted from at once. In step k, row i stands for token i + k; it sees the rows of step 1 up to
    its own position, as a cache of the head holds them, and the rows of its own earlier drafts.
    """
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    rows = tokens.shape[1] - 1 - drafts
    state, guess = hidden[:, :rows], tokens[:, 1 : rows + 1]
    joined: list[torch.Tensor] = []
    right = torch.zeros(rows, dtype=torch.long, device=tokens.device)
    unbroken = torch.ones(rows, dtype=torch.bool, device=tokens.device)
    for k in range(1, drafts + 1):
        joined.append(head.joined(head.embed(guess), state))
        positions = torch.cat([torch.arange(rows, device=tokens.device) + step for step in range(k)])[None]
        states = head.run_layer(torch.cat(joined, 1), positions, _mask(rows, k, joined[0]))
        state, logits = head.states_and_logits(states[:, -rows:])
        guess = logits.argmax(-1)
        unbroken = unbroken & (guess[0] == tokens[0, 1 + k : 1 + k + rows])
        right += unbroken
    # the token that the first step embeds must be one that the model wrote
    return right[begin - 1 :]


def _mask(rows: int, steps: int, like: torch.Tensor) -> torch.Tensor:
    """[1, 1, steps x rows, steps x rows]: step 1 is causal; later steps also see their own row of each step between."""
    causal = torch.ones(rows, rows, dtype=torch.bool, device=like.device).tril()
    diagonal = torch.eye(rows, dtype=torch.bool, device=like.device)
    none = torch.zeros_like(diagonal)
    lines = [torch.cat([causal, *(diagonal if j <= i else none for j in range(1, steps))], 1) for i in range(steps)]
    seen = torch.cat(lines)
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill(~seen, torch.finfo(like.dtype).min)[None, None]
