"""The named metrics against their papers' formulas, in plain torch."""

import pytest
import torch

from prunevolve.pruning.baselines import BASELINES, NAMED
from prunevolve.pruning.parse import named_metric


def relative_importance(W):
    return W / W.sum(0, keepdim=True) + W / W.sum(1, keepdim=True)


# By W (absolute), G, X (squared norms), V, B, H and M.
FORMULAS = {
    "magnitude": lambda W, G, X, V, B, H, M: W,
    "wanda": lambda W, G, X, V, B, H, M: W * X**0.5,
    "ria": lambda W, G, X, V, B, H, M: relative_importance(W) * (X**0.5) ** 0.5,
    "gblm": lambda W, G, X, V, B, H, M: W * X**0.5 + W * G,
    "snip": lambda W, G, X, V, B, H, M: W * G,
    "pruner-zero": lambda W, G, X, V, B, H, M: W**2 * (G - G.min()) / (G.max() - G.min()),
    "relative-importance": lambda W, G, X, V, B, H, M: relative_importance(W),
    "ria-full": lambda W, G, X, V, B, H, M: relative_importance(W) * X**0.5,
    "gblm-gradient": lambda W, G, X, V, B, H, M: W * G,
    "gblm-alpha-10": lambda W, G, X, V, B, H, M: W * X**0.5 + 10 * W * G / 100,
    "wanda-root": lambda W, G, X, V, B, H, M: W * (X**0.5) ** 0.5,
    "symwanda": lambda W, G, X, V, B, H, M: W * (X + B**2) ** 0.5,
    "symwanda-l2": lambda W, G, X, V, B, H, M: (
        (W / W.norm(dim=0) + W / W.norm(dim=1)[:, None]) * X**0.25
    ),
    "movement": lambda W, G, X, V, B, H, M: W * M,
    "sparsegpt-score": lambda W, G, X, V, B, H, M: W**2 / H,
    "wifv": lambda W, G, X, V, B, H, M: V * W**2,
    "directed-snip-wanda": lambda W, G, X, V, B, H, M: (
        (W * G)
        * (W / (W.mean(1, keepdim=True) + W.mean(0)))
        * (X.sqrt() / X.sqrt().mean())
        * torch.exp(0.2 * relative((M / G).mean(0)))
    ),
    "directed-snip-variance": lambda W, G, X, V, B, H, M: (
        (W * G)
        * (W / (W.mean(1, keepdim=True) * W.mean(0)).sqrt())
        * (V.sqrt() / X.sqrt().mean()) ** 1.5
        * torch.exp(0.2 * relative((M / G).mean(0)))
    ),
}


def relative(values):
    return values / values.square().mean().sqrt()


@pytest.mark.parametrize("name", NAMED)
def test_named_metric_is_the_formula_that_it_is_said_to_be(name):
    generator = torch.Generator().manual_seed(0)
    W, G = torch.rand(5, 7, generator=generator), torch.rand(5, 7, generator=generator)
    X, V = torch.rand(1, 7, generator=generator), torch.rand(1, 7, generator=generator)
    B, M = torch.rand(5, 1, generator=generator), torch.randn(5, 7, generator=generator)
    H = torch.rand(1, 7, generator=generator) + 0.1
    metric = named_metric(name).metric
    scores = metric.check_scores_weights().score(W=W, G=G, X=X, V=V, B=B, H=H, M=M)
    torch.testing.assert_close(scores, FORMULAS[name](W, G, X, V, B, H, M))


def test_baselines_are_named_metrics():
    assert set(BASELINES) < NAMED.keys()
