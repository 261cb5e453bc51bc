"""Bits: what rounding each weight matrix costs, and which matrices get more bits.

A way to store a matrix W in few bits adds some dW to it. To second order, the rounded model's
predictions diverge from the model's by KL(model || rounded model) =

    harm[W, dW] = 1/tokens * sum over samples of 1/2 (sum_t d_t . (dW x_t))^2        nats a token

x_t is what W reads at token t. Next tokens are drawn from the model itself, and d_t is the gradient
of their negative log-likelihood at W's output (the Hessian of KL is the Fisher matrix). As in the
probe, no gradient of a weight is formed. A tied embedding adds the sums of both ends before the
square. Harms of matrices add up, so bits go, step by step, where harm falls most a byte.

Letters: B samples of a batch, T tokens, N rows of a layer's input, O options, V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sensitivity import measuring

# Of a module: for each of its options, a function that computes dW (out, in), or (V, D).
Options = Sequence[Callable[[], Tensor]]


def harms(model: nn.Module, options: Mapping[str, Options], batches: Iterable[Sequence[Tensor]],
          seed: int = 0, progress: Callable[[int], Any] = lambda samples: None,
          ) -> dict[str, list[float]]:
    """{module: the harm of each of its options}, in nats a token.

    options: of linear layers and embeddings, by module; of a tied weight under one of its two. Each
    dW is computed once a batch. batches: tuples that begin with input_ids and attention_mask, each
    (B, T). The model is left as it was. Raises ValueError if there is no batch.
    """
    generator, tokens = torch.Generator().manual_seed(seed), 0
    totals = {name: torch.zeros(len(each)).double() for name, each in options.items()}
    with measuring(model):
        for ids, mask, *_ in batches:
            for name, sums in sample_sums(model, options, ids, mask, generator).items():
                totals[name] += sums.double().cpu().square().sum(0) / 2
            tokens += int(mask.sum())
            progress(len(ids))
    if not tokens:
        raise ValueError("there is no batch to measure on (a generator can be read only once)")
    return {name: (total / tokens).tolist() for name, total in totals.items()}


def sample_sums(model: nn.Module, options: Mapping[str, Options], input_ids: Tensor,
                attention_mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """sum_t d_t . (dW x_t), (B, O), of each sample of one batch, for each of the modules."""
    parameter = next(model.parameters())
    ids, mask = (t.to(parameter.device) for t in (input_ids, attention_mask.bool()))
    wide, sums = torch.promote_types(parameter.dtype, torch.float32), dict[str, Tensor]()
    with ExitStack() as afterwards, torch.enable_grad():
        for name, each in options.items():
            weight = model.get_submodule(name).weight
            sums[name] = mask.new_zeros(len(mask), len(each), dtype=wide, requires_grad=True)
            for module in model.modules():
                if getattr(module, "weight", None) is weight:
                    afterwards.enter_context(module.register_forward_hook(
                        lambda module, inputs, y, shared=(sums[name], mask, each): _Sums.apply(
                            y, *shared, inputs[0], getattr(module, "embed_scale", 1.0))))
        output = model(input_ids=ids, attention_mask=mask.long())
        logits = getattr(output, "logits", output)[mask].to(wide)                      # (N, V)
        F.cross_entropy(logits, drawn(logits.detach(), generator), reduction="sum").backward()
    return {name: total.grad for name, total in sums.items() if total.grad is not None}


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token (N,) of each row's softmax (N, V). The generator is of the CPU, for any device."""
    below = logits.softmax(-1).cumsum_(-1)
    u = torch.rand(len(logits), 1, generator=generator).to(below) * below[:, -1:]
    return torch.searchsorted(below, u)[:, 0].clamp_(max=logits.shape[1] - 1)


class _Sums(torch.autograd.Function):
    """The identity of y, with sum_t d_t . (dW x_t) of each sample as the gradient of sums (B, O).
    Compared in tests/method/test_bits.py::test_equals_plain_loops."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, sums: Tensor, mask: Tensor, options: Options, x: Tensor,
                scale: float) -> Tensor:
        """mask (B, T). x: rows, or tokens of an embedding, which multiplies by `scale` itself."""
        ctx.save_for_backward(x, mask)
        ctx.options, ctx.scale, ctx.dtype = options, scale, sums.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (x, mask), d, of_rows = ctx.saved_tensors, dy.flatten(0, -2).to(ctx.dtype), []
        for change in ctx.options:
            dW = change().to(dy)
            z = F.linear(x, dW) if x.is_floating_point() else F.embedding(x, dW) * ctx.scale
            of_rows.append(torch.linalg.vecdot(z.reshape(d.shape).to(d), d))           # (N,)
        rows = torch.stack(of_rows, 1)
        if len(rows) < mask.numel():                     # rows of real tokens alone
            rows = rows.new_zeros(mask.numel(), rows.shape[1]).masked_scatter_(
                mask.flatten()[:, None], rows)
        return dy, rows.view(*mask.shape, -1).sum(1), None, None, None, None


def spend(harm: Mapping[str, Sequence[float]], cost: Mapping[str, Sequence[int]], budget: int,
           ) -> dict[str, int]:
    """The number of each module's option: at first the cheapest; then, again and again, the step
    that takes away most harm for its cost, among those that the budget still pays. cost: in bytes,
    or any unit. Raises ValueError, with the least possible, for too small a budget."""
    chosen = {name: costs.index(min(costs)) for name, costs in cost.items()}
    left = budget - sum(cost[name][now] for name, now in chosen.items())
    if left < 0:
        raise ValueError(f"{budget} is too small: the least possible is {budget - left}")
    while steps := [((harm[name][now] - harm[name][new]) / more, name, new, more)
                    for name, now in chosen.items() for new in range(len(cost[name]))
                    if 0 < (more := cost[name][new] - cost[name][now]) <= left
                    and harm[name][new] < harm[name][now]]:
        _, name, chosen[name], more = max(steps, key=lambda step: step[0])
        left -= more
    return chosen
