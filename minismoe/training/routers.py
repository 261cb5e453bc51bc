"""What trained routers do: how sure their choices are, and whether they tell the tasks apart.

u[t, e] is expert e's share of the gates of one matrix, over the N tokens of task t. With E experts
and T tasks, two numbers from 0 to 1 describe a matrix:

    entropy     mean over tokens of H(softmax of the router) / log E    1: all experts alike
    separation  I(task; expert) / log min(T, E)                         1: each task has its own

I is the mutual information with equal weight for each task: the mean over t of
sum over e of u[t, e] log(u[t, e] / u[e]), where u[e] is the mean of u[t, e] over t.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..method.experts import expert_layers, top_k_gates, without_pads

COLLAPSED = 0.01                             # an expert with a lower share in every task


@torch.no_grad()
def router_use(model: nn.Module, tasks: Mapping[str, Iterable[Sequence[Tensor]]],
               ) -> dict[str, dict[str, Any]]:
    """{module: {"use": {task: [share of each expert]}, "entropy": {task: .}, "separation": .}}.

    tasks: batches as for `probe`. Matrices with one expert have no router and are left out.
    """
    layers = {name: m for name, m in expert_layers(model).items() if m.router is not None}
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for task, batches in tasks.items():
        for ids, mask, _ in batches:
            model.model(ids, mask)               # type: ignore[operator]
            for name, layer in layers.items():
                assert layer.router_logits is not None
                logits = without_pads(layer.router_logits, mask).float()         # (N, E)
                log_p = logits.log_softmax(-1)
                entropy = -(log_p.exp() * log_p).sum() / math.log(logits.shape[1])
                gates = top_k_gates(logits, layer.top_k).sum(0)
                new = torch.cat([gates, entropy[None]]).cpu().double()
                sums[name][task] = sums[name].get(task, 0) + new                 # (E + 1,)
    return {name: _summary(by_task) for name, by_task in sums.items()}


def _summary(by_task: Mapping[str, Tensor]) -> dict[str, Any]:
    """One matrix's numbers from its sums over N tokens: E sums of gates, then one of entropies."""
    means = torch.stack([s / s[:-1].sum() for s in by_task.values()])            # (T, E + 1)
    u, entropy = means[:, :-1], means[:, -1]
    information = torch.special.xlogy(u, u / u.mean(0).clamp_min(1e-300)).sum(1).mean()
    bound = math.log(min(u.shape)) or 1.0        # with one task the information is 0
    return {"use": dict(zip(by_task, [[round(x, 4) for x in row] for row in u.tolist()])),
            "entropy": dict(zip(by_task, [round(x, 4) for x in entropy.tolist()])),
            "separation": round(information.item() / bound, 4)}


def collapsed(use: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """"module: expert i" of each expert that no task uses."""
    return [f"{name}: expert {i}" for name, found in use.items()
            for i, shares in enumerate(zip(*found["use"].values())) if max(shares) < COLLAPSED]
