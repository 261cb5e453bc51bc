"""Experts: a frozen linear layer plus the top-k of E LoRA experts, as two matrix products.

The layer is `reference.Mixture`, whose loop over experts is slow and cannot be exported. Stacked,
the experts are one chain: h = x A^T with A flattened to (E*r, in), each expert's r entries of h
times its gate (0 outside the top-k), y += h B with B flattened to (E*r, out). Since r is small,
computing all experts costs less than gathering the chosen ones.

Letters: N tokens, E experts of a matrix, r rank, k experts active a token.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .allocate import Allocation

PARTS = ("lora_A", "router", "lora_B")


def top_k_gates(logits: Tensor, k: int) -> Tensor:
    """Softmax over the k largest of (..., E) router logits, zero elsewhere."""
    if k >= logits.shape[-1]:
        return logits.softmax(-1)
    values, chosen = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter_(-1, chosen, values.softmax(-1))


class Routing(torch.autograd.Function):
    """Router logits: x (N, in) @ router.T, in the router's dtype. The backward casts x again: to
    keep x in float32 for each matrix would take twice the memory of x in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor) -> Tensor:
        ctx.save_for_backward(x, router)
        return x.to(router.dtype) @ router.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor, Tensor]:
        x, router = ctx.saved_tensors
        return (d_logits @ router).to(x.dtype), d_logits.T @ x.to(router.dtype)


class ExpertLinear(nn.Linear):
    """A frozen nn.Linear with LoRA experts: lora_A (E, r, in), lora_B (E, r, out), router (E, in),
    which a layer of one expert and a frozen layer lack: there each gate is 1. B starts at 0, so
    that y = W x at first."""

    router_logits: Tensor | None = None  # (N, E) of the last forward, for `take_logits`

    def __init__(self, linear: nn.Linear, experts: int, rank: int, alpha: float, top_k: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.experts, self.rank = experts, rank
        self.top_k, self.scaling = min(top_k, experts), alpha / rank
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        new: dict[str, Any] = dict(dtype=dtype, device=linear.weight.device)
        bound = 1 / math.sqrt(self.in_features)          # the rule of nn.Linear and of PEFT
        self.lora_A = nn.Parameter(
            torch.empty(experts, rank, self.in_features, **new).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(experts, rank, self.out_features, **new))
        self.router = None if experts == 1 else nn.Parameter(
            torch.empty(experts, self.in_features, **new).normal_(std=0.02))

    def dense(self) -> Tensor:
        """The frozen weight (out, in), dequantised if it is quantised."""
        return self.weight if isinstance(self.weight, Tensor) else self.weight.dense()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.reshape(-1, self.in_features)
        A, B = self.lora_A.flatten(0, 1).to(x.dtype), self.lora_B.flatten(0, 1)
        h = rows @ A.T                                                   # (N, E*r)
        if self.router is not None:
            self.router_logits = Routing.apply(rows, self.router)        # (N, E)
            gates = top_k_gates(self.router_logits, self.top_k).to(x.dtype)
            h = (h.unflatten(1, (self.experts, -1)) * gates[..., None]).flatten(1)
        y = (F.linear(rows, self.weight, self.bias) if isinstance(self.weight, Tensor)
             else self.weight(rows, self.bias))                          # quantised
        return y.addmm_(h, (self.scaling * B).to(x.dtype)).view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def lora(self) -> tuple[Tensor, Tensor]:
        """All experts side by side as one LoRA, A (E*r, in) and B (out, E*r), which holds the
        scaling: what a layer without a router adds is B A x."""
        return self.lora_A.flatten(0, 1), self.scaling * self.lora_B.flatten(0, 1).T

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy, which cannot copy router logits that have a graph."""
        return {**self.__dict__, "router_logits": None}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that can have experts, by name: every nn.Linear but the head."""
    return {name: m for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and name.split(".")[-1] != "lm_head"}


def add_experts(model: nn.Module, experts: Allocation | Mapping[str, int], *, rank: int = 8,
                top_k: int = 2) -> nn.Module:
    """Freeze `model`, and put LoRA experts on its linear layers, in place.

    experts: an `Allocation`, or {module: number of experts}; `rank` and `top_k` are for the latter,
    whose alpha is twice the rank. A number may be 0, as in the paper's files. Raises ValueError for
    wrong values, and as `adaptable` does.
    """
    if not isinstance(experts, Allocation):
        experts = Allocation(dict(experts), rank, 2 * rank, top_k)
    if problems := experts.problems():
        raise ValueError("; ".join(problems))
    counts = {name: count for name, count in experts.experts.items() if count}
    layers = adaptable(model, replace(experts, experts=counts))
    model.requires_grad_(False)
    for name, count in counts.items():
        model.set_submodule(name, ExpertLinear(
            layers[name], count, experts.rank, experts.alpha, experts.top_k))
    return model


def adaptable(model: nn.Module, allocation: Allocation) -> dict[str, nn.Linear]:
    """The linear layers of `model`. Raises ValueError if it has experts already, and with the
    modules of the allocation that are no linear layer, are the head (it may be tied), or are below
    the rank."""
    if expert_layers(model):
        raise ValueError("the model has experts already: load the base anew")
    layers = linear_layers(model)
    if wrong := [name for name in allocation.experts if name not in layers]:
        raise ValueError(f"no linear layer that can be adapted: {', '.join(wrong)}")
    allocation.check_rank({name: m.weight.shape for name, m in layers.items()})
    return layers


def expert_layers(model: nn.Module) -> dict[str, ExpertLinear]:
    """The adapted layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ExpertLinear)}


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """lora_A (E, r, in), lora_B (E, r, out) and router (E, in) of all experts, by full name."""
    return {f"{name}.{part}": getattr(layer, part) for name, layer in expert_layers(model).items()
            for part in PARTS if getattr(layer, part) is not None}


@torch.no_grad()
def merged(weight: Tensor, layer: ExpertLinear) -> Tensor:
    """weight + B A of a layer without a router, summed in float32 or better, and rounded once to
    weight's dtype."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A, B = (part.to(weight.device, dtype) for part in layer.lora())
    return torch.addmm(weight.to(dtype), B, A).to(weight.dtype)


def routed(model: nn.Module) -> bool:
    """Whether any layer of a model still chooses among its experts by a router."""
    return any(layer.router is not None for layer in expert_layers(model).values())


def drop_routers(model: nn.Module) -> None:
    """Let each layer of a model add all its experts with a gate of 1, as frozen ones do."""
    for layer in expert_layers(model).values():
        layer.router = layer.router_logits = None


def packs_tokens(model: nn.Module) -> bool:
    """Whether layers of a model see rows of real tokens alone; else rows of all B * T positions."""
    return getattr(getattr(model, "model", model), "packs_tokens", False)


def take_logits(layers: Mapping[str, ExpertLinear]) -> dict[str, tuple[Tensor, int]]:
    """Router logits (N, E) of the last forward of each layer that chooses among its experts, and
    its k; the layers forget them, as they may hold a graph."""
    taken = {name: (m.router_logits, m.top_k) for name, m in layers.items()
             if m.router_logits is not None and m.top_k < m.experts}
    for layer in layers.values():
        layer.router_logits = None
    return taken


def balance_loss(routing: Mapping[str, tuple[Tensor, int]], weights: Tensor) -> Tensor:
    """Mean `reference.balance_loss` over the matrices that choose among their experts: it is always
    1 where all are active.

    routing: as `take_logits` gives it. weights (N,): how often a row counts: in how many sequences
    it occurs, 0 for padding.
    """
    same_sizes = defaultdict[tuple[int, int], list[Tensor]](list)    # together: few kernels
    for logits, k in routing.values():
        same_sizes[logits.shape[1], k].append(logits)
    losses = []
    for (E, k), of_matrices in same_sizes.items():
        logits = torch.stack(of_matrices)                            # (matrices, N, E)
        p, times = logits.softmax(-1), weights.to(logits.dtype)
        chosen = torch.zeros_like(p).scatter_(-1, logits.topk(k, -1).indices, 1 / k)
        used = times @ chosen            # (matrices, E): how many tokens each expert gets
        tokens = used.sum(-1, keepdim=True)
        losses.append(E * (used / tokens * (times @ p) / tokens).sum(-1))
    return torch.cat(losses).mean() if losses else torch.zeros((), device=weights.device)
