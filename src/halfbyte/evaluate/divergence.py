"""Per-token numbers from logits: the negative log-likelihood, and the divergence from a reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass
class Scores:
    """Collected over all scored tokens: negative log-likelihoods (nats), divergences (nats), equal top tokens.

    ``window`` is the number of the window that each token is in.
    """

    nll: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    same_top: list[torch.Tensor] = field(default_factory=list)
    window: list[torch.Tensor] = field(default_factory=list)

    def add(
        self, log_probs: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None, window: int = 0
    ) -> None:
        """Count FP32 log-probabilities [tokens, vocabulary] of the tokens ``targets`` [tokens]."""
        self.add_nll(log_probs, targets, window)
        if reference is not None:
            self.add_kl(divergence(reference, log_probs), reference.argmax(1) == log_probs.argmax(1))

    def add_nll(self, log_probs: torch.Tensor, targets: torch.Tensor, window: int = 0) -> None:
        """Count the likelihoods of some tokens, without divergences."""
        self.nll.append(-log_probs.gather(1, targets[:, None])[:, 0].double().cpu())
        self.window.append(torch.full(targets.shape, window))

    def add_kl(self, kl: torch.Tensor, same_top: torch.Tensor) -> None:
        """Count divergences, and whether top tokens are the same, [tokens] each."""
        self.kl.append(kl.double().cpu())
        self.same_top.append(same_top.cpu())

    def arrays(self) -> TokenScores:
        """All of it as NumPy arrays."""
        kl, top = (torch.cat(p).numpy() if p else None for p in (self.kl, self.same_top))
        return TokenScores(torch.cat(self.nll).numpy(), torch.cat(self.window).numpy(), kl, top)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return self.arrays().perplexity

    @property
    def divergence(self) -> dict[str, float] | None:
        """Mean, median and upper percentiles of the divergence, and how often the top token is the same."""
        return self.arrays().divergence if self.kl else None


@dataclass
class TokenScores:
    """Per scored token: ``nll`` and ``kl`` in nats (FP64), ``same_top`` bool, ``window`` its window's number."""

    nll: Floats
    window: NDArray[np.int64]
    kl: Floats | None = None
    same_top: NDArray[np.bool_] | None = None

    @property
    def is_finite(self) -> bool:
        """Whether every likelihood and every divergence is a finite number."""
        return all(bool(np.isfinite(values).all()) for values in (self.nll, self.kl) if values is not None)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; infinite where no number holds it."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.nll.mean()))

    @property
    def divergence(self) -> dict[str, float]:
        """mean, median, p90, p99 of the divergence and top1, the share of equal top tokens."""
        assert self.kl is not None and self.same_top is not None
        median, p90, p99 = (float(q) for q in np.quantile(self.kl, (0.5, 0.9, 0.99)))
        top = float(self.same_top.mean())
        return {"mean": float(self.kl.mean()), "median": median, "p90": p90, "p99": p99, "top1": top}


def log_softmax(logits: Any) -> torch.Tensor:
    """FP32 log-probabilities over the whole vocabulary."""
    return torch.log_softmax(logits.float(), dim=-1)


def divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) in nats per token, of FP32 log-probabilities [tokens, vocabulary]; summed in FP64."""
    probability = reference.exp()
    # tokens that the reference rules out contribute nothing, even where both have minus infinity; a NaN stays one
    terms = torch.where(probability == 0, 0.0, probability * (reference - other))
    return terms.sum(dim=1, dtype=torch.float64)
