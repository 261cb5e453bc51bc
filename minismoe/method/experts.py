"""Experts: a frozen linear layer plus the top-k of E LoRA experts, as two matrix products.

The layer is `reference.Mixture`, whose loop over experts is slow and cannot be exported. Stacked,
the experts are one chain: h = x A^T with A flattened to (E*r, in), each expert's r entries of h
times its gate (0 outside the top-k), y += h B with B flattened to (E*r, out). Since r is small,
computing all experts costs less than gathering the chosen ones.

Matrices that read the same x (q, k, v; gate, up) form a group. While there are `Copies` of experts
(training/copies.py), the A's of a group are one matrix, so that x meets it once, and its gates are
chosen at once: on a GPU, the number of kernels decides how long a small model takes. So all
matrices of a group have as many slots as the largest has experts; empty slots are 0, and no token
chooses them.
Letters: N tokens, E experts of a matrix, or its slots, n matrices of a group, r rank, k experts
active a token, R = n*E*r.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .allocation import Allocation

PARTS = ("lora_A", "router", "lora_B")


def top_k_gates(logits: Tensor, k: int) -> Tensor:
    """Softmax over the k largest of (..., E) router logits, zero elsewhere."""
    if k >= logits.shape[-1]:
        return logits.softmax(-1)
    values, chosen = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter_(-1, chosen, values.softmax(-1))


class Stack(NamedTuple):
    """The experts of a layer, or of a group of layers, as these multiply with them."""

    A: Tensor                    # (R, in), in the dtype of x
    B: Sequence[Tensor]          # (E*r, out) of each layer, times its scaling, in the dtype of x
    routers: Tensor | None       # (n*E, in), float32; None if E is 1
    empty: Tensor | None         # (n*E,), float32: -inf for an empty slot, 0 for an expert
    top_k: int


class _Group(torch.autograd.Function):
    """Layers that read the same x. Plainly, for each of them:

        h = x @ A.T
        gates = top_k_gates(x @ router.T + empty, k)         1 without a router
        y = x @ W.T + (h * gates.repeat_interleave(r, 1)) @ B

    In the fused form, A holds the rows of all layers and routers those of all their slots, so that
    h and the gates of all come from one product each. The backward is written by hand, and adds
    products in place. Beside x and the weights it keeps the gates and g * h, but not h: the sum of
    (dy @ B.T) * (g * h) is gates * d_gates already. From dy of a layer, g for repeated gates:

        d_gates = sum over an expert's r columns of (dy @ B.T) * h
        d_logits = gates * (d_gates - sum over experts of gates * d_gates) + the balance loss's
        dx = dy @ W + (g * (dy @ B.T)) @ A + d_logits @ router
        dA = (g * (dy @ B.T)).T @ x,   dB = (g * h).T @ dy,   d_router = d_logits.T @ x

    Compared with `reference.Mixture` in
    tests/method/test_experts.py::test_forward_and_every_gradient_equal_the_reference.
    """

    @staticmethod
    def forward(ctx: Any, layers: Sequence["ExpertLinear"], x: Tensor, stack: Stack, A: Tensor,
                routers: Tensor | None, *B: Tensor) -> tuple[Tensor, ...]:
        """x (N, in) -> y (N, out) of each layer; and router logits (N, n, E), if routed."""
        gh, gates, logits = x @ A.T, None, []
        if routers is not None:
            logits = [F.linear(x.to(routers.dtype), routers, stack.empty).unflatten(
                1, (len(layers), -1))]
            gates = top_k_gates(logits[0], stack.top_k)
            gh.unflatten(1, (*gates.shape[1:], -1)).mul_(gates[..., None])       # (N, n, E, r)
        outputs = [F.linear(x, layer.dense(), layer.bias).addmm_(gh_i, B_i)
                   for layer, gh_i, B_i in zip(layers, gh.split([len(b) for b in B], 1), B)]
        ctx.layers = layers
        ctx.save_for_backward(x, gh, gates, A, routers, *B)
        return *outputs, *logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """dy (N, out) of each layer, and that of the logits -> gradients of the inputs."""
        layers, (x, gh, gates, A, routers, *B) = ctx.layers, ctx.saved_tensors
        dys, d_logits, d_routers = gradients[:len(layers)], None, None
        dhs = [dy @ b.T for dy, b in zip(dys, B)]
        dh = dhs[0] if len(dhs) == 1 else torch.cat(dhs, 1)                      # (N, R)
        if routers is not None:
            # Of the softmax: d_logits = g * dg - g * sum of g * dg.
            by_expert = dh.unflatten(1, (*gates.shape[1:], -1))                  # (N, n, E, r)
            g_dg = (by_expert * gh.view_as(by_expert)).sum(-1, dtype=gates.dtype)
            d_logits = g_dg.addcmul(gates, g_dg.sum(-1, keepdim=True), value=-1)
            d_logits = (d_logits + gradients[-1]).flatten(1)
            d_routers = d_logits.T @ x.to(routers.dtype)
            by_expert.mul_(gates[..., None])
        dx = None
        if ctx.needs_input_grad[1]:
            dx = dh @ A
            if d_logits is not None:
                dx.addmm_(d_logits.to(x.dtype), routers.to(x.dtype))
            for layer, dy in zip(layers, dys):
                dx.addmm_(dy, layer.dense())
        dBs = [gh_i.T @ dy for gh_i, dy in zip(gh.split([len(b) for b in B], 1), dys)]
        return None, dx, None, dh.T @ x, d_routers, *dBs


class ExpertLinear(nn.Linear):
    """A frozen nn.Linear with LoRA experts: lora_A (E, r, in), lora_B (E, r, out), router (E, in),
    which E = 1 lacks. B starts at 0, so that y = W x at first."""

    stack: Stack | None = None           # of the group that this layer leads; None: no copies
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
        leads_itself = self.stack is not None and len(self.stack.B) == 1
        return _apply(x, [self], self.stack if leads_itself else None)[0]

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy, which cannot copy router logits that have a graph."""
        return {**self.__dict__, "router_logits": None}


def linear_outputs(x: Tensor, *linears: nn.Linear) -> list[Tensor]:
    """The outputs of linear layers that read the same x: adapted ones are computed as a group if
    there are copies of their experts, and if no hook needs its own layer's call."""
    layers = [m for m in linears if isinstance(m, ExpertLinear)]
    stack = layers[0].stack if layers else None
    if stack is None or len(stack.B) != len(layers) or any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
            or m._backward_pre_hooks for m in layers):
        return [m(x) for m in linears]
    outputs: dict[Any, Tensor] = dict(zip(layers, _apply(x, layers, stack)))
    return [outputs[m] if m in outputs else m(x) for m in linears]


def _apply(x: Tensor, layers: Sequence[ExpertLinear], stack: Stack | None) -> list[Tensor]:
    """The outputs of a group; or of one layer by its parameters, if there is no stack."""
    if stack is None:
        (m,) = layers
        stack = Stack(m.lora_A.flatten(0, 1).to(x.dtype), [(m.scaling * m.lora_B.flatten(0, 1)).to(
            x.dtype)], m.router, None, m.top_k)
    y = _Group.apply(layers, x.reshape(-1, x.shape[-1]), stack, stack.A, stack.routers, *stack.B)
    if stack.routers is not None:
        for layer, logits in zip(layers, y[-1].unbind(1)):
            layer.router_logits = logits
    return [part.view(*x.shape[:-1], part.shape[-1]) for part in y[:len(layers)]]


def groups(model: nn.Module) -> list[list[ExpertLinear]]:
    """The adapted layers that read the same x, in the order of the modules. A module tells which of
    its linear layers do by `same_input`, tuples of their names."""
    result, grouped = list[list[ExpertLinear]](), set[nn.Module]()
    for module in model.modules():
        readers: list[Any] = [[getattr(module, name, None) for name in names]
                              for names in getattr(module, "same_input", ())]
        for layers in [*readers, [module]]:
            group = [m for m in layers if isinstance(m, ExpertLinear) and m not in grouped]
            grouped.update(group)
            result += [group] if group else []
    return result


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


def packs_tokens(model: nn.Module) -> bool:
    """Whether layers of a model see rows of real tokens alone; else rows of all B * T positions."""
    return getattr(getattr(model, "model", model), "packs_tokens", False)


def take_logits(layers: Mapping[str, ExpertLinear]) -> dict[str, tuple[Tensor, int]]:
    """Router logits (N, E) of the last forward of each layer that chooses among its experts, and
    its k; the layers forget them, as they may hold a graph."""
    taken = {name: (m.router_logits[:, :m.experts], m.top_k) for name, m in layers.items()
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
