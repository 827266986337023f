"""A model over the windows of a passage: log-probabilities, a few tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from halfbyte.errors import HalfbyteError, MeasurementError
from halfbyte.evaluate.divergence import Scores, TokenScores, log_softmax
from halfbyte.evaluate.models import vocabulary
from halfbyte.evaluate.reference_logprobs import Cache, Reference, Writer
from halfbyte.evaluate.results import environment
from halfbyte.evaluate.text import Passage
from halfbyte.evaluate.windows import batches

LOGITS_BYTES = 64 << 20  # of one batch, in FP32
CHUNK_BYTES = 32 << 20  # of the log-probabilities that are looked at together, in FP32

Progress = Callable[[int, int], None]


def score(
    model: Any,
    passage: Passage,
    reference: Reference | None = None,
    writer: Writer | None = None,
    progress: Progress | None = None,
) -> TokenScores:
    """Likelihoods of a passage's tokens, in their order; divergences from a ``reference``; or write one.

    ``progress`` is called with the number of windows done and their total. MeasurementError where one is not finite.
    """
    scores, position = Scores(), 0
    for window, log_probs, targets in log_probabilities(model, passage, progress):
        scores.add_nll(log_probs, targets, window)
        if reference is not None:
            scores.add_kl(*reference.compare(position, log_probs))
        if writer is not None:
            writer.add(log_probs)
        position += len(targets)
    token_scores = scores.arrays()
    if not (token_scores.is_finite and math.isfinite(token_scores.perplexity)):
        raise MeasurementError("logits are finite, but so far apart that likelihoods or divergences of tokens are not")
    return token_scores


def reference_key(
    model: str, passage: Passage, dtype: str, device: Any, dequantize: bool, **more: Any
) -> dict[str, Any]:
    """What the source's log-probabilities depend on; ``model`` is the hash of its contents."""
    versions = environment()["versions"]
    protocol = passage.protocol
    return {
        "model": model,
        "tokens": protocol.sha256,
        "cut": [protocol.kind, protocol.length, protocol.stride, *([] if passage.bos is None else [passage.bos])],
        "dtype": dtype,
        "device": str(device or "cpu"),
        "dequantize": dequantize,
        "versions": {name: versions.get(name) for name in ("halfbyte", "torch", "transformers")},
        **more,
    }


def store_reference(
    cache: Cache, key: dict[str, Any], model: Any, passage: Passage, progress: Progress | None = None
) -> Reference:
    """Run the source over a passage and keep its log-probabilities."""
    with cache.write(key, vocabulary(model), passage.protocol.tokens) as writer:
        scores = score(model, passage, writer=writer, progress=progress)
        writer.close(key, nll=scores.nll, window=scores.window)
    reference = cache.find(key)
    if reference is None:
        raise HalfbyteError(f"the reference in {cache.folder} vanished while it was in use; run again")
    return reference


@torch.inference_mode()
def log_probabilities(
    model: Any, passage: Passage, progress: Progress | None = None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The window's number, FP32 log-probabilities [tokens, vocabulary] and the tokens that came, for all scored ones.

    Windows come in their order, each in one or more parts.
    """
    device = next(model.parameters()).device
    size = vocabulary(model)
    largest = max(*passage.tokens, passage.bos or 0)
    if largest >= size:
        raise HalfbyteError(f"the tokenizer gives token {largest}, but the model has only {size}")
    rows = max(1, CHUNK_BYTES // (4 * size))
    for batch in batches(passage.windows, LOGITS_BYTES // (4 * size)):
        cut = [passage.windows[i] for i in batch]
        ids = torch.tensor([passage.inputs(window) for window in cut], device=device)
        logits = model(input_ids=ids, use_cache=False).logits
        for i, (number, window) in enumerate(zip(batch, cut, strict=True)):
            first, last = window.scored - window.start, window.size
            for begin in range(first, last, rows):
                end = min(begin + rows, last)
                yield number, log_softmax(logits[i, begin - 1 : end - 1]), ids[i, begin:end]
        del logits
        if progress is not None:
            progress(batch[-1] + 1, len(passage.windows))
