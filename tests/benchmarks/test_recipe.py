"""The parts that recipe.py puts in place of the training loop's."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import recipe
from tiny import tiny

from minismoe.method import experts
from minismoe.method.experts import expert_layers
from minismoe.training.loop import TrainConfig, learning_rate


def test_the_cosine_is_that_of_the_loop() -> None:
    cfg = TrainConfig(lr=0.5, warmup=0.2)
    for step in range(40):
        assert recipe.rate_at("cosine", step, 40, cfg) == learning_rate(step, 40, cfg)
    assert recipe.rate_at("linear", 24, 40, cfg) == pytest.approx(0.25)
    assert recipe.rate_at("constant", 39, 40, cfg) == 0.5


def test_without_dropout_the_plain_layers_equal_the_fused_ones() -> None:
    layers = list(expert_layers(tiny()).values())[:2]
    x = torch.randn(2, 5, layers[0].in_features)
    for ours, fused in zip(recipe.apply_dropped(x, layers, share=0.0), experts._apply(x, layers)):
        torch.testing.assert_close(ours, fused)


def test_b_gets_a_multiple_of_the_rate_of_a() -> None:
    """A step of Adam is the rate, whatever the gradient."""
    router, a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = recipe.TwoRates([[router], [a], [b]], 16, lr=0.01, weight_decay=0.0)
    for p in (router, a, b):
        p.grad = torch.ones(1)
    optimizer.step()
    assert [-p.item() for p in (router, a, b)] == pytest.approx([0.01, 0.0025, 0.04], rel=1e-5)
    assert math.isclose(b.item() / a.item(), 16, rel_tol=1e-5)
