"""Formula 3: a frozen linear layer plus the top-k of E LoRA experts, as two matrix products.

    y = W x + scaling * sum over the top-k experts e of  g_e(x) B_e A_e x
    g = softmax over the k largest router logits (float32),  scaling = lora_alpha / r

A loop over experts is slow and cannot be exported. Stacked, the experts are one chain:
h = x A^T with A flattened to (E*r, in); each expert's r entries of h are scaled by its gate, which
is zero outside the top-k; y += h B with B flattened to (E*r, out). A dense product over all experts
costs less than gathering the few chosen ones, as r is small.

The balance loss is that of Switch (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6) in the
top-k form of Mixtral: E * sum over e of f_e P_e, with f_e the share of tokens that use expert e
and P_e the mean router probability.

Letters: N tokens, E experts of a matrix, r rank, k experts active a token.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def top_k_gates(logits: Tensor, k: int) -> Tensor:
    """Softmax over the k largest of (N, E) router logits, zero elsewhere."""
    if k >= logits.shape[-1]:
        return logits.softmax(-1)
    values, chosen = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter_(-1, chosen, values.softmax(-1))


class _Experts(torch.autograd.Function):
    """The formula and its gradient; by hand, so that every sum lands in its matrix product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor,
                lora_B: Tensor, router: Tensor | None, k: int, scaling: float,
                ) -> tuple[Tensor, Tensor | None]:
        """x (N, in) -> y (N, out), router logits (N, E)."""
        E, r, _ = lora_A.shape
        A, B = lora_A.flatten(0, 1).to(x.dtype), lora_B.flatten(0, 1).to(x.dtype)
        h = x @ A.T                                                      # (N, E*r)
        logits = gates = None
        if router is not None:
            logits = x.to(router.dtype) @ router.T                       # (N, E)
            gates = top_k_gates(logits, k)
            scale = (gates * scaling).to(x.dtype)[..., None]             # (N, E, 1)
        else:
            scale = torch.full((1, 1, 1), scaling, dtype=x.dtype, device=x.device)
        gated = (h.unflatten(1, (E, r)) * scale).flatten(1)
        y = F.linear(x, weight, bias)
        y.addmm_(gated, B)
        ctx.save_for_backward(x, weight, lora_A, lora_B, router, h, scale, gates)
        ctx.scaling = scaling
        return y, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_logits: Tensor | None) -> tuple[Tensor | None, ...]:
        """dy (N, out), and d_logits (N, E) of the balance loss -> a gradient for each input."""
        x, weight, lora_A, lora_B, router, h, scale, gates = ctx.saved_tensors
        E, r, _ = lora_A.shape
        A, B = lora_A.flatten(0, 1).to(x.dtype), lora_B.flatten(0, 1).to(x.dtype)
        h = h.unflatten(1, (E, r))
        d_gated = (dy @ B.T).unflatten(1, (E, r))
        dB = (h * scale).flatten(1).T @ dy
        dh = (d_gated * scale).flatten(1)
        dA = dh.T @ x
        dx = d_router = None
        if router is not None:
            d_gates = (d_gated * h).sum(-1, dtype=gates.dtype) * ctx.scaling     # (N, E)
            through = gates * (d_gates - (gates * d_gates).sum(-1, keepdim=True))
            d_logits = through if d_logits is None else through + d_logits
            d_router = d_logits.T @ x.to(router.dtype)
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dx.addmm_(dh, A)
            if d_logits is not None:
                dx.addmm_(d_logits.to(x.dtype), router.to(x.dtype))
        dA, dB = dA.to(lora_A.dtype).view_as(lora_A), dB.to(lora_B.dtype).view_as(lora_B)
        return dx, None, None, dA, dB, d_router, None, None


class ExpertLinear(nn.Linear):
    """A frozen nn.Linear with LoRA experts beside it; weight and bias keep their names.

    lora_A (E, r, in), lora_B (E, r, out), router (E, in), absent where E = 1.
    """

    def __init__(self, linear: nn.Linear, experts: int, rank: int, alpha: float, top_k: int):
        """Adapt `linear`, whose weight is shared and frozen. B starts at 0, so y = W x at first."""
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

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y, logits = _Experts.apply(x.reshape(-1, self.in_features), self.weight, self.bias,
                                   self.lora_A, self.lora_B, self.router, self.top_k, self.scaling)
        self.router_logits = logits
        return y.view(*x.shape[:-1], self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy, which refuses the graph behind the last router logits."""
        return {**self.__dict__, "router_logits": None}


def add_experts(model: nn.Module, experts: Any, *, rank: int = 8,
                alpha: float | None = None, top_k: int = 2) -> nn.Module:
    """Freeze `model` and put LoRA experts on its linear layers, in place.

    experts: module name -> number of experts, or an `Allocation`, which brings its own rank, alpha
    and top_k. Raises ValueError with all names that are no nn.Linear of the model, or that are its
    head: a tied head must stay tied, so it is never adapted.
    """
    if hasattr(experts, "experts"):
        rank, alpha, top_k = experts.rank, experts.alpha, experts.top_k
        experts = experts.experts
    alpha = 2 * rank if alpha is None else alpha
    modules = dict(model.named_modules())
    wrong = [name for name in experts if not isinstance(modules.get(name), nn.Linear)
             or isinstance(modules[name], ExpertLinear) or name.split(".")[-1] == "lm_head"]
    if wrong:
        raise ValueError(f"no linear layer that can be adapted: {', '.join(wrong)}")
    model.requires_grad_(False)
    for name, count in experts.items():
        if count == 0:                   # the paper's files list matrices without an adapter too
            continue
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, ExpertLinear(modules[name], count, rank, alpha, top_k))
    return model


def expert_layers(model: nn.Module) -> dict[str, ExpertLinear]:
    """The adapted layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ExpertLinear)}


def balance_loss(layers: Iterable[ExpertLinear], attention_mask: Tensor) -> Tensor:
    """Mean balance loss of the last forward over the routed matrices; 1 is perfect balance.

    attention_mask (B, T): where a model kept its pads in the rows, they are left out here.
    """
    stacks = defaultdict(list)           # matrices of equal E at once: few kernels, not hundreds
    for layer in layers:
        if layer.router_logits is not None:
            stacks[layer.router_logits.shape[-1], layer.top_k].append(
                without_pads(layer.router_logits, attention_mask))
    losses = []
    for (E, k), logits in stacks.items():
        p = torch.stack(logits).softmax(-1)                              # (matrices, N, E)
        used = torch.zeros_like(p).scatter_(-1, p.topk(k, -1).indices, 1 / k).mean(1)
        losses.append(E * (used * p.mean(1)).sum(-1))
    if not losses:
        return torch.zeros((), device=attention_mask.device)
    return torch.cat(losses).mean()


def without_pads(rows: Tensor, attention_mask: Tensor) -> Tensor:
    """The real tokens of (N, ...) rows, which hold all B*T positions or only the real ones."""
    if len(rows) == attention_mask.numel():
        return rows[attention_mask.reshape(-1).bool()]
    return rows


def expert_use(layers: Mapping[str, ExpertLinear], attention_mask: Tensor,
               ) -> dict[str, list[float]]:
    """Share of the last forward's (token, choice) pairs that went to each expert, by matrix."""
    use = {}
    for name, layer in layers.items():
        if layer.router_logits is not None:
            logits = without_pads(layer.router_logits.detach(), attention_mask)
            chosen = logits.topk(layer.top_k, -1).indices.reshape(-1)
            use[name] = (chosen.bincount(minlength=logits.shape[-1]) / len(chosen)).tolist()
    return use
