"""routers.py against counts by hand, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import random_hf
from torch import nn

from minismoe.method.experts import add_experts, expert_layers
from minismoe.training.routers import collapsed, router_use

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


def test_shares_entropy_and_separation_equal_counts_by_hand() -> None:
    model = routed([[9, -9], [-9, 9], [0, 0], [math.log(3), 0]], 1)
    tasks = {"a": [batch([[0, 0], [0, 1]], [2, 1])],          # token 1 is a pad here
             "b": [batch([[1, 1]], [2]), batch([[1, 3]], [2])]}
    found = router_use(model, tasks)["model.proj"]
    assert found["use"] == {"a": [1.0, 0.0], "b": [0.25, 0.75]}
    last = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert found["entropy"]["a"] == pytest.approx(0, abs=1e-4)
    assert found["entropy"]["b"] == pytest.approx(last / 4, abs=1e-4)
    p = 0.625                                                  # of expert 0
    expected = (math.log(1 / p) + 0.25 * math.log(0.25 / p) + 0.75 * math.log(0.75 / (1 - p))) / 2
    assert found["separation"] == pytest.approx(expected / math.log(2), abs=1e-4)


def test_separation_is_1_for_tasks_apart_and_0_for_tasks_alike_or_one() -> None:
    model = routed([[9, -9], [-9, 9], [0, 0], [0, 0]], 1)
    one, other = [batch([[0, 0]], [2])], [batch([[1, 1]], [2])]
    assert router_use(model, {"a": one, "b": other})["model.proj"]["separation"] == 1
    assert router_use(model, {"a": one, "b": one})["model.proj"]["separation"] == 0
    assert router_use(model, {"a": one})["model.proj"]["separation"] == 0


def test_an_expert_that_no_task_uses_is_named() -> None:
    model = routed([[9, -9, 0], [8, -9, 9], [9, -9, 9], [0, -9, 9]], 2)
    use = router_use(model, {"a": [batch([[0, 1]], [2])], "b": [batch([[2, 3]], [2])]})
    assert collapsed(use) == ["model.proj: expert 1"]


def test_a_transformers_model_is_measured() -> None:
    model = random_hf("llama")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    add_experts(model, {name: 1 + i % 3 for i, name in enumerate(names)})
    ids = torch.randint(0, 97, (2, T))
    use = router_use(model, {"<a>": [(ids, torch.ones_like(ids), ids)]})
    assert set(use) == {n for n, m in expert_layers(model).items() if m.router is not None}
    for found in use.values():
        assert sum(found["use"]["<a>"]) == pytest.approx(1, abs=1e-3)
        assert 0 <= found["entropy"]["<a>"] <= 1
    assert router_use(random_hf("llama"), {}) == {}
