"""Some steps of AdamW on one layer; the best masters by held-out error stay, the start included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from halfbyte.train.straight_through import TrainedWeight
from halfbyte.train.training_loop import TrainingOptions, schedule


def fit_layer(
    weights: Mapping[str, TrainedWeight],
    error: Callable[[int], torch.Tensor],
    batches: tuple[Sequence[int], Sequence[int]],
    rate: float,
    options: TrainingOptions,
    order: np.random.Generator,
) -> tuple[float, float]:
    """Train the masters of ``weights``; the held-out error before and after.

    ``error`` gives the layer's mean squared error on the batch that begins at a sequence, ``batches`` where those of
    training and those held out begin. An error that is not a number ends the training at the best step so far.
    """
    masters = [weight.master for weight in weights.values()]
    optimizer = torch.optim.AdamW(masters, lr=rate, betas=options.betas, weight_decay=0.0)
    start = best = _mean(error, batches[1])
    kept = [master.detach().clone() for master in masters]
    firsts, every = np.array(batches[0]), options.check_every or options.steps
    for step in range(options.steps):
        if step % len(firsts) == 0:
            order.shuffle(firsts)
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, options)
        optimizer.zero_grad(set_to_none=True)
        loss = error(int(firsts[step % len(firsts)]))
        if not torch.isfinite(loss):
            break
        loss.backward()
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == options.steps:
            held_out = _mean(error, batches[1])
            if held_out < best:
                best, kept = held_out, [master.detach().clone() for master in masters]
    with torch.no_grad():
        for master, values in zip(masters, kept, strict=True):
            master.copy_(values)
    return start, best


@torch.no_grad()
def _mean(error: Callable[[int], torch.Tensor], firsts: Sequence[int]) -> float:
    return sum(float(error(first)) for first in firsts) / len(firsts)
