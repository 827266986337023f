"""``evaluate``: checkpoints on a text, against their source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.divergence import Scores, log_softmax
from halfbyte.evaluate.text import find_text, tokens_of
from halfbyte.evaluate.windows import Protocol, Window, windows
from halfbyte.runtime.loading import load, load_tokenizer
from halfbyte.view import Checkpoint

LOGITS_BYTES = 64 << 20  # of one batch, in FP32


def evaluate(
    paths: Sequence[str | Path] | str | Path,
    against: str | Path | None = None,
    text: str | Path | None = None,
    length: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "float32",
    dequantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Perplexity of each checkpoint on a text and, with ``against``, its divergence from that one.

    ``text``: a UTF-8 file (default: the demo model's held-out text, where the checkpoint is the demo model). It is
    tokenized without special tokens, by the tokenizer of ``against`` or else of the first checkpoint, cut to its first
    ``max_tokens`` tokens and into windows of ``length`` tokens, ``stride`` apart (default: ``length``); each token is
    scored once. One row per checkpoint, ``against`` first:

    ``name``, ``path``; ``perplexity``; ``kl``: None or mean, median, p90, p99 of KL(source || checkpoint) in nats per
    token over the whole vocabulary, and top1, the share of tokens whose most likely next token is the same;
    ``tokens`` scored; ``bytes`` of all tensors and ``bits_per_weight`` over all parameters; ``protocol``: what the
    numbers depend on.

    All models are in memory at once (4-bit checkpoints in 4 bit, unless ``dequantize``), logits only for a batch of
    windows. ``progress`` is called with the number of windows done and their total.
    """
    chosen = [paths] if isinstance(paths, (str, Path)) else list(paths)
    every = ([against] if against is not None else []) + [p for p in chosen if p != against]
    if not every:
        raise HalfbyteError("there is no checkpoint to evaluate")
    checkpoints = [Checkpoint.open(path) for path in every]
    source = find_text(text, checkpoints[0].inventory.root)
    tokens = tokens_of(source, load_tokenizer(every[0]), max_tokens)
    step = stride or length
    cut = list(windows(len(tokens), length, step))
    if not cut:
        raise HalfbyteError(f"the text {source} is too short: it has {len(tokens)} tokens")
    models = [load(path, dtype, dequantize, device) for path in every]
    scored = sum(window.stop - window.scored for window in cut)
    protocol = Protocol(source.name, length, step, len(cut), scored, str(dtype).removeprefix("torch."))
    _check(models, every, tokens, length)
    scores = [Scores() for _ in models]
    done = 0
    for batch in _batches(cut, _vocabulary(models[0]) * 4):
        _score(models, scores, tokens, batch, against is not None)
        done += len(batch)
        if progress is not None:
            progress(done, len(cut))
    return [
        _row(path, checkpoint, found, protocol)
        for path, checkpoint, found in zip(every, checkpoints, scores, strict=True)
    ]


def _check(models: list[Any], paths: list[Any], tokens: list[int], length: int) -> None:
    sizes = [_vocabulary(model) for model in models]
    for size, path, model in zip(sizes, paths, models, strict=True):
        if size != sizes[0]:
            raise HalfbyteError(
                f"{path} has a vocabulary of {size} tokens, {paths[0]} one of {sizes[0]}; only checkpoints of one "
                "model can be compared"
            )
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions and length > positions:
            raise HalfbyteError(f"{path} has {positions} positions, so windows of {length} tokens are too long for it")
    if max(tokens) >= sizes[0]:
        raise HalfbyteError(f"the tokenizer gives token {max(tokens)}, but {paths[0]} has only {sizes[0]}")


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _batches(cut: list[Window], bytes_per_token: int) -> Iterator[list[Window]]:
    """Windows of equal length, as many at a time as their logits allow."""
    batch: list[Window] = []
    for window in cut:
        size = window.stop - window.start
        full = len(batch) * size * bytes_per_token >= LOGITS_BYTES
        if batch and (full or size != batch[0].stop - batch[0].start):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.inference_mode()
def _score(models: list[Any], scores: list[Scores], tokens: list[int], batch: list[Window], compare: bool) -> None:
    """Run all models over a batch; the reference's log-probabilities live only as long as the batch."""
    device = next(models[0].parameters()).device
    ids = torch.tensor([tokens[w.start : w.stop] for w in batch], device=device)
    reference: list[torch.Tensor] | None = None
    for model, found in zip(models, scores, strict=True):
        logits = model(input_ids=ids, use_cache=False).logits
        parts = []
        for i, window in enumerate(batch):
            first, last = window.scored - window.start, window.stop - window.start
            parts.append(log_softmax(logits[i, first - 1 : last - 1]))
        del logits
        if reference is None and compare:
            reference = parts
        for i, window in enumerate(batch):
            targets = ids[i, window.scored - window.start :]
            found.add(parts[i], targets, None if reference is None else reference[i])


def _row(path: str | Path, checkpoint: Checkpoint, found: Scores, protocol: Protocol) -> dict[str, Any]:
    size = checkpoint.inventory.total_bytes
    parameters = sum(math.prod(weight.shape) for weight in checkpoint.weights)
    return {
        "name": Path(path).resolve().name if Path(path).exists() else str(path),
        "path": str(path),
        "perplexity": found.perplexity,
        "kl": found.divergence,
        "tokens": protocol.tokens,
        "bytes": size,
        "bits_per_weight": 8 * size / max(parameters, 1),
        "protocol": protocol.as_dict(),
    }
