"""Whether trained routers tell the tasks apart.

u[t, e] is expert e's share of the gates of one matrix, over the tokens of task t. With E experts
and T tasks, a matrix has

    separation  I(task; expert) / log min(T, E)       1: each task has its own experts; 0: all alike

I is the mutual information with equal weight for each task: the mean over t of
sum over e of u[t, e] log(u[t, e] / u[e]), where u[e] is the mean of u[t, e] over t.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from minismoe.method.experts import expert_layers, packs, top_k_gates


@torch.no_grad()
def shares_of_gates(model: nn.Module, tasks: Mapping[str, Iterable[Sequence[Tensor]]],
                    ) -> dict[str, Tensor]:
    """{module: u (T, E)}. tasks: batches as for `probe`. Matrices without a router are left out."""
    layers = {name: m for name, m in expert_layers(model).items() if m.router is not None}
    sums = {name: torch.zeros(len(tasks), len(m.router)).double() for name, m in layers.items()}
    for t, batches in enumerate(tasks.values()):
        for ids, mask, _ in batches:
            model.model(ids, mask)
            for name, layer in layers.items():
                gates = top_k_gates(layer.router_logits.float(), layer.top_k)    # (N, E)
                real = gates if packs(model) else gates[mask.flatten().bool()]
                sums[name][t] += real.sum(0).cpu()
    return {name: u / u.sum(1, keepdim=True) for name, u in sums.items()}


def separation(u: Tensor) -> float:
    """The separation of one matrix, from u (T, E); of one task it is 0."""
    information = torch.special.xlogy(u, u / u.mean(0).clamp_min(1e-300)).sum(1).mean()
    return information.item() / (math.log(min(u.shape)) or 1.0)
