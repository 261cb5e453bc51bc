"""routers.py against counts by hand, token by token."""

import math

import pytest
import torch
from routers import separation, shares_of_gates
from tiny import random_hf
from torch import nn

from minismoe.method.experts import add_experts, expert_layers

T = 6


class Reads(nn.Module):
    """A "model" whose one linear layer reads the embedding of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.proj(torch.eye(4)[ids])


def routed(logits: list[list[float]], k: int) -> nn.Module:
    """Token i gets the router logits logits[i]."""
    model = nn.Module()
    model.model = Reads()
    add_experts(model, {"model.proj": len(logits[0])}, rank=2, top_k=k)
    with torch.no_grad():
        model.model.proj.router.copy_(torch.tensor(logits).T)
    return model


def batch(rows: list[list[int]], real: list[int]) -> tuple[torch.Tensor, ...]:
    ids = torch.tensor(rows)
    return ids, torch.tensor([[int(i < n) for i in range(ids.shape[1])] for n in real]), ids


def test_shares_and_separation_equal_counts_by_hand() -> None:
    model = routed([[9, -9], [-9, 9], [0, 0], [math.log(3), 0]], 1)
    tasks = {"a": [batch([[0, 0], [0, 1]], [2, 1])],          # token 1 is a pad here
             "b": [batch([[1, 1]], [2]), batch([[1, 3]], [2])]}
    u = shares_of_gates(model, tasks)["model.proj"]
    assert u.tolist() == [[1.0, 0.0], [0.25, 0.75]]
    p = 0.625                                                  # of expert 0
    expected = (math.log(1 / p) + 0.25 * math.log(0.25 / p) + 0.75 * math.log(0.75 / (1 - p))) / 2
    assert separation(u) == pytest.approx(expected / math.log(2))


def test_separation_is_1_for_tasks_apart_and_0_for_tasks_alike_or_one() -> None:
    apart = torch.eye(2).double()
    assert separation(apart) == pytest.approx(1)
    assert separation(apart[[0, 0]]) == separation(apart[:1]) == 0


def test_a_transformers_model_is_measured() -> None:
    model = random_hf("llama")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    add_experts(model, {name: 1 + i % 3 for i, name in enumerate(names)})
    ids = torch.randint(0, 97, (2, T))
    shares = shares_of_gates(model, {"<a>": [(ids, torch.ones_like(ids), ids)]})
    assert set(shares) == {n for n, m in expert_layers(model).items() if m.router is not None}
    assert all(u.sum().item() == pytest.approx(1) for u in shares.values())
    assert shares_of_gates(random_hf("llama"), {}) == {}
