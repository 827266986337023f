from __future__ import annotations

import numpy as np
import torch
from torch import nn

from halfbyte.calibrate.output_gradients import CLIP, GradientObserver


def observed(gradient: torch.Tensor) -> GradientObserver:
    layer = nn.Linear(8, gradient.shape[1], bias=False).requires_grad_(False)
    observer = GradientObserver({"layer.weight": layer.weight}, ["layer.weight"])
    x = torch.ones(len(gradient), 8, requires_grad=True)
    with observer:
        result = layer(x)
    result.backward(gradient)
    observer.end_batch()
    return observer


def test_gradients_of_usual_size_are_summed_as_they_are() -> None:
    g = torch.nn.functional.normalize(torch.randn(50, 4, generator=torch.Generator().manual_seed(1)))
    observer = observed(g)
    np.testing.assert_allclose(observer.outputs["layer.weight"], g.T @ g, rtol=1e-5, atol=1e-6)
    assert not observer.concentrated()


def test_one_huge_gradient_counts_as_four_usual_ones_and_is_reported() -> None:
    g = torch.nn.functional.normalize(torch.randn(50, 4, generator=torch.Generator().manual_seed(1)))
    g[7] *= 1e6
    observer = observed(g)
    assert float(observer.outputs["layer.weight"].trace()) <= 49 + CLIP**2 * 1.01
    assert observer.concentrated()["layer.weight"] > 0.99


def test_tokens_without_gradient_do_not_lower_the_median() -> None:
    g = torch.zeros(50, 4)
    g[:5] = torch.eye(5, 4)
    g[4, 0] = 1
    assert float(observed(g).outputs["layer.weight"].trace()) == 5.0


def test_only_wanted_matrices_are_summed() -> None:
    layer = nn.Linear(8, 4, bias=False).requires_grad_(False)
    observer = GradientObserver({"layer.weight": layer.weight}, [])
    with observer:
        result = layer(torch.ones(3, 8, requires_grad=True))
    result.sum().backward()
    observer.end_batch()
    assert not observer.outputs
