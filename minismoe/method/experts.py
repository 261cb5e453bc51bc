"""Experts: a frozen linear layer plus the top-k of E LoRA experts, as two matrix products.

The layer is `reference.Mixture`, whose loop over experts is slow and cannot be exported. Stacked,
the experts are one chain: h = x A^T with A flattened to (E*r, in), each expert's r entries of h
times its gate (0 outside the top-k), y += h B with B flattened to (E*r, out). Since r is small,
computing all experts costs less than gathering the chosen ones.
Letters: N tokens, E experts, r rank, k experts active a token.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .allocation import Allocation


def top_k_gates(logits: Tensor, k: int) -> Tensor:
    """Softmax over the k largest of (N, E) router logits, zero elsewhere."""
    if k >= logits.shape[-1]:
        return logits.softmax(-1)
    values, chosen = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter_(-1, chosen, values.softmax(-1))


class _Experts(torch.autograd.Function):
    """Several layers that read the same x (q, k, v; gate, up). Plainly, for each of them:

        h = x @ A.T;  gates = top_k_gates(x @ router.T, k)
        y = x @ W.T + scaling * (h * gates.repeat_interleave(r, 1)) @ B

    A's and routers of all layers are stacked, so x meets them in two products. The backward is
    written by hand so that additions fuse into addmm. Compared with `reference.Mixture` in
    tests/method/test_experts.py::test_forward_and_every_gradient_equal_the_reference.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence["ExpertLinear"], *parameters: Tensor | None,
                ) -> tuple[Tensor, ...]:
        """x (N, in) -> y (N, out) of each layer, and the router logits (N, sum of E) of all.
        `parameters`: lora_A, lora_B, router of each layer in turn, so that autograd knows them."""
        A, routers, ranks, counts = _stacked(layers, x)
        h, logits = x @ A.T, x.to(routers.dtype) @ routers.T
        outputs, scales = [], []
        for layer, h_i, logits_i in zip(layers, h.split(ranks, 1), logits.split(counts, 1)):
            scales.append(layer.scaling * (
                logits.new_ones(len(x), 1) if layer.router is None
                else top_k_gates(logits_i, layer.top_k)))                        # (N, E)
            y = F.linear(x, layer.dense(), layer.bias)
            outputs.append(y.addmm_(gated(h_i, scales[-1]), _flat(layer.lora_B, x)))
        ctx.layers = layers
        ctx.save_for_backward(x, h, *scales)
        return *outputs, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """dy (N, out) of each layer and d_logits of the balance loss -> gradients of the inputs."""
        layers, (x, h, *scales), (*dys, balance) = ctx.layers, ctx.saved_tensors, gradients
        A, routers, ranks, counts = _stacked(layers, x)
        d = x.new_empty(len(x), len(A) + len(routers))       # of h and of the logits
        d[:, len(A):] = balance
        parts, dBs = d.split(ranks + counts, 1), []
        for layer, dy, h_i, scale, dh, d_logits in zip(
                layers, dys, h.split(ranks, 1), scales, parts, parts[len(layers):]):
            d_gated = dy @ _flat(layer.lora_B, x).T                              # (N, E*r)
            dBs.append(gated(h_i, scale).T @ dy)
            dh.copy_(gated(d_gated, scale))
            if layer.router is not None:          # softmax: d_logits = g * dg - g * sum of g * dg
                each = (d_gated * h_i).unflatten(1, (scale.shape[1], -1)).sum(-1, dtype=scale.dtype)
                each = each.mul_(scale)                                          # (N, E): g * dg
                d_logits += each - scale * (each.sum(-1, keepdim=True) / layer.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = d @ torch.cat((A, routers.to(x.dtype)))
            for layer, dy in zip(layers, dys):
                dx.addmm_(dy, layer.dense())
        dAs = (d.T @ x).split(ranks + counts)
        of_parameters = [
            None if p is None else g.to(p.dtype).view_as(p)
            for layer, dA, dB, d_router in zip(layers, dAs, dBs, dAs[len(layers):])
            for p, g in ((layer.lora_A, dA), (layer.lora_B, dB), (layer.router, d_router))]
        return dx, None, *of_parameters


def _stacked(layers: Sequence["ExpertLinear"], x: Tensor,
             ) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """A's (sum of E*r, in) in x's dtype, routers (sum of E, in), and the rows of each layer."""
    A = [_flat(layer.lora_A, x) for layer in layers]
    routers = [layer.lora_A[0, :0] if layer.router is None else layer.router for layer in layers]
    return torch.cat(A), torch.cat(routers), [len(a) for a in A], [len(r) for r in routers]


def _flat(experts: Tensor, x: Tensor) -> Tensor:
    """(E, r, .) -> (E*r, .) in x's dtype."""
    return experts.flatten(0, 1).to(x.dtype)


def gated(h: Tensor, scale: Tensor) -> Tensor:
    """(N, E*r), each expert's r entries times its entry of (N, E)."""
    return (h.unflatten(1, (scale.shape[1], -1)) * scale.to(h.dtype)[..., None]).flatten(1)


class ExpertLinear(nn.Linear):
    """A frozen nn.Linear with LoRA experts: lora_A (E, r, in), lora_B (E, r, out), router (E, in),
    which E = 1 lacks. B starts at 0, so that y = W x at first."""

    def __init__(self, linear: nn.Linear, experts: int, rank: int, alpha: float, top_k: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.top_k, self.scaling = min(top_k, experts), alpha / rank
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        new: dict[str, Any] = dict(dtype=dtype, device=linear.weight.device)
        bound = 1 / math.sqrt(self.in_features)          # the rule of nn.Linear and of PEFT
        self.lora_A = nn.Parameter(
            torch.empty(experts, rank, self.in_features, **new).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(experts, rank, self.out_features, **new))
        self.router = None if experts == 1 else nn.Parameter(
            torch.empty(experts, self.in_features, **new).normal_(std=0.02))
        self.router_logits: Tensor | None = None         # (N, E) of the last forward

    def dense(self) -> Tensor:
        """The frozen weight (out, in), dequantised if it is quantised."""
        return self.weight if isinstance(self.weight, Tensor) else self.weight.dense()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return _apply(x, [self])[0]

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy, which cannot copy router logits that have a graph."""
        return {**self.__dict__, "router_logits": None}


def together(x: Tensor, *linears: nn.Linear) -> list[Tensor]:
    """The outputs of several linear layers on the same x, adapted ones computed jointly, unless a
    hook needs its own layer's call."""
    layers = [m for m in linears if isinstance(m, ExpertLinear) and not (
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)]
    outputs: dict[Any, Tensor] = dict(zip(layers, _apply(x, layers) if layers else []))
    return [outputs[m] if m in outputs else m(x) for m in linears]


def _apply(x: Tensor, layers: Sequence[ExpertLinear]) -> list[Tensor]:
    kind = x.device.type                                 # casts are explicit, so no autocast
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _apply(x.to(layers[0].weight.dtype), layers)
    parameters = [p for m in layers for p in (m.lora_A, m.lora_B, m.router)]
    *outputs, logits = _Experts.apply(x.reshape(-1, x.shape[-1]), layers, *parameters)
    routed = [m for m in layers if m.router is not None]
    for layer, part in zip(routed, logits.split([len(m.lora_A) for m in routed], 1)):
        layer.router_logits = part
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that can have experts, by name: every nn.Linear but the head."""
    return {name: m for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and name.split(".")[-1] != "lm_head"}


def add_experts(model: nn.Module, experts: Allocation | Mapping[str, int], *, rank: int = 8,
                top_k: int = 2) -> nn.Module:
    """Freeze `model` and put LoRA experts on its linear layers, in place.

    experts: an `Allocation`, or {module: number of experts}; `rank` and `top_k` are for the latter,
    whose alpha is twice the rank. Raises ValueError for wrong values, and as `adaptable` does.
    """
    if not isinstance(experts, Allocation):
        experts = Allocation(dict(experts), rank, 2 * rank, top_k)
    if problems := experts.problems():
        raise ValueError("; ".join(problems))
    layers = adaptable(model, experts)
    model.requires_grad_(False)
    for name, count in experts.experts.items():
        if count > 0:                    # the paper's files list matrices without an adapter too
            model.set_submodule(name, ExpertLinear(
                layers[name], count, experts.rank, experts.alpha, experts.top_k))
    return model


def adaptable(model: nn.Module, allocation: Allocation) -> dict[str, nn.Linear]:
    """The linear layers of `model`. Raises ValueError with the modules of the allocation that are
    no linear layer, are the head (it may be tied), have experts already, or are below the rank."""
    layers, adapted = linear_layers(model), expert_layers(model)
    if wrong := [name for name in allocation.experts if name not in layers or name in adapted]:
        raise ValueError("no linear layer that can be adapted" + (
            " (some have experts already: load the base anew)" if adapted else "")
            + f": {', '.join(wrong)}")
    allocation.check_rank({name: m.weight.shape for name, m in layers.items()})
    return layers


def expert_layers(model: nn.Module) -> dict[str, ExpertLinear]:
    """The adapted layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ExpertLinear)}


def balance_loss(layers: Iterable[ExpertLinear], attention_mask: Tensor,
                 copies: Tensor | None = None,
                 total: Callable[[Tensor], Tensor] = lambda counts: counts) -> Tensor:
    """Mean `reference.balance_loss` of the last forward over the routed matrices.

    attention_mask (B, T): pads, if rows hold them, do not count. copies (N,): in how many sequences
    each row occurs. If processes hold parts of a batch, `total` sums counts over them; then the
    losses and gradients of processes add up to the batch's.
    """
    stacks = defaultdict(list)           # matrices of equal N and E together: few kernels
    for layer in layers:
        if layer.router_logits is not None:
            stacks[layer.router_logits.shape, layer.top_k].append(layer.router_logits)
    if not stacks:
        return torch.zeros((), device=attention_mask.device)
    losses = []
    for (_, k), logits in stacks.items():
        rows = without_pads(torch.stack(logits, 1), attention_mask).transpose(0, 1)
        p = rows.softmax(-1)                                             # (matrices, N, E)
        # The last MLP may see fewer rows than the others; each of them occurs in one sequence.
        times = (copies.to(p.dtype) if copies is not None and len(copies) == p.shape[1]
                 else p.new_ones(p.shape[1]))
        chosen = torch.zeros_like(p).scatter_(-1, rows.topk(k, -1).indices, 1 / k)
        used = total(times @ chosen)     # (matrices, E): how many tokens each expert gets
        tokens = used.sum(-1, keepdim=True)
        losses.append(p.shape[-1] * (used / tokens * (times @ p) / tokens).sum(-1))
    return torch.cat(losses).mean()


def without_pads(rows: Tensor, attention_mask: Tensor) -> Tensor:
    """The real tokens of rows (N, ...) that hold all B*T positions or the real tokens only."""
    full = len(rows) == attention_mask.numel()
    return rows[attention_mask.reshape(-1).bool()] if full else rows


def expert_use(layers: Mapping[str, ExpertLinear], attention_mask: Tensor,
               ) -> dict[str, list[float]]:
    """Share of the last forward's (token, choice) pairs that went to each expert, by matrix."""
    use = {}
    for name, layer in layers.items():
        if layer.router_logits is not None:
            logits = without_pads(layer.router_logits.detach(), attention_mask)
            chosen = logits.topk(layer.top_k, -1).indices.flatten()
            use[name] = (chosen.bincount(minlength=logits.shape[-1]) / len(chosen)).tolist()
    return use
