"""Per-token numbers from logits: the negative log-likelihood, and the divergence from a reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class Scores:
    """Collected over all scored tokens: negative log-likelihoods (nats), divergences (nats), equal top tokens."""

    nll: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    same_top: list[torch.Tensor] = field(default_factory=list)

    def add(self, log_probs: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None) -> None:
        """Count FP32 log-probabilities [tokens, vocabulary] of the tokens ``targets`` [tokens]."""
        self.nll.append(-log_probs.gather(1, targets[:, None])[:, 0].double().cpu())
        if reference is not None:
            self.kl.append(divergence(reference, log_probs).cpu())
            self.same_top.append((reference.argmax(1) == log_probs.argmax(1)).cpu())

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return float(torch.cat(self.nll).mean().exp())

    @property
    def divergence(self) -> dict[str, float] | None:
        """Mean, median and upper percentiles of the divergence, and how often the top token is the same."""
        if not self.kl:
            return None
        values = torch.cat(self.kl).numpy()
        median, p90, p99 = (float(q) for q in np.quantile(values, (0.5, 0.9, 0.99)))
        top = float(torch.cat(self.same_top).double().mean())
        return {"mean": float(values.mean()), "median": median, "p90": p90, "p99": p99, "top1": top}


def log_softmax(logits: Any) -> torch.Tensor:
    """FP32 log-probabilities over the whole vocabulary."""
    return torch.log_softmax(logits.float(), dim=-1)


def divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) in nats per token, of FP32 log-probabilities [tokens, vocabulary]; summed in FP64."""
    probability = reference.exp()
    # tokens that the reference rules out contribute nothing, even where both have minus infinity
    terms = torch.where(probability > 0, probability * (reference - other), 0.0)
    return terms.sum(dim=1, dtype=torch.float64)
