from __future__ import annotations

import math

import pytest
import torch

from halfbyte.evaluate.divergence import Scores, divergence, log_softmax


def logits(seed: int, tokens: int = 50, vocabulary: int = 30) -> torch.Tensor:
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def test_the_divergence_equals_that_of_torch_s_own_distributions() -> None:
    p, q = logits(0), logits(1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()), torch.distributions.Categorical(logits=q.double())
    )
    torch.testing.assert_close(divergence(log_softmax(p), log_softmax(q)), expected, rtol=1e-5, atol=1e-6)


def test_the_reference_comes_first_in_the_divergence() -> None:
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(log_softmax(p), log_softmax(q)).item() == pytest.approx(expected, rel=1e-6)


def test_a_model_diverges_from_itself_by_exactly_nothing() -> None:
    p = log_softmax(logits(0))
    assert divergence(p, p.clone()).abs().max() == 0


def test_tokens_that_both_rule_out_contribute_nothing() -> None:
    p, q = logits(0), logits(1)
    masked = [torch.cat([x, torch.full((50, 2), -torch.inf)], dim=1) for x in (p, q)]
    torch.testing.assert_close(
        divergence(*map(log_softmax, masked)), divergence(log_softmax(p), log_softmax(q)), rtol=1e-12, atol=0
    )


def test_low_precision_logits_are_widened_before_the_softmax() -> None:
    p = logits(0).bfloat16()
    assert torch.equal(log_softmax(p), torch.log_softmax(p.float(), -1))


def test_scores_give_perplexity_percentiles_and_agreement() -> None:
    p, q = log_softmax(logits(0)), log_softmax(logits(1))
    targets = torch.arange(50) % 30
    scores = Scores()
    for part in (slice(0, 20), slice(20, 50)):
        scores.add(q[part], targets[part], p[part])
    kl = divergence(p, q)
    found = scores.divergence
    assert found is not None
    assert scores.perplexity == pytest.approx(math.exp(torch.nn.functional.nll_loss(q, targets).item()), rel=1e-6)
    assert found["mean"] == pytest.approx(kl.mean().item())
    assert [found[k] for k in ("median", "p90", "p99")] == pytest.approx(
        torch.quantile(kl, torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).tolist()
    )
    assert found["top1"] == (p.argmax(1) == q.argmax(1)).double().mean().item()


def test_without_a_reference_there_is_no_divergence() -> None:
    scores = Scores()
    scores.add(log_softmax(logits(0)), torch.zeros(50, dtype=torch.int64), None)
    assert scores.divergence is None
