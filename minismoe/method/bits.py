"""Bits: what rounding each weight matrix costs, and which matrices get more bits.

A way to store a matrix W in few bits adds some dW to it, at a cost in nats a token of

    harm = 1/tokens * sum over samples of 1/2 (sum_t d_t . (dW x_t))^2,    x_t: what W reads

which is KL(model || rounded model) to second order, by the Fisher matrix: d_t is the gradient, at
W's output, of the negative log-likelihood of next tokens that are drawn from the model itself. As
in the probe, no gradient of a weight is formed. A tied embedding adds the sums of both ends before
the square. Harms add up, so bits go, step by step, where harm falls most a byte.
Letters: B samples of a batch, T tokens, N rows of a layer's input, O options, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .hooks import frozen
from .loss import CHUNK

TOKENS = 6144                    # of the texts, on which harm is measured: 1460 chose worse
AT_ONCE = 640                    # of them: 1 MB of activations each (SmolLM2-135M)
# Of a module: for each of its options, a function that computes dW (out, in), or (V, D).
Options = Sequence[Callable[[], Tensor]]


def harms(model: Any, options: Mapping[str, Options], batches: Iterable[Sequence[Tensor]],
          seed: int = 0) -> dict[str, list[float]]:
    """{module: the harm of each of its options}, in nats a token. The model is left as it was.

    options: of linear layers and embeddings, by module; of a tied weight under one of its two. Each
    dW is computed once a batch. batches: tuples that begin with input_ids and attention_mask, each
    (B, T). Raises ValueError if there is none.
    """
    generator, tokens = torch.Generator().manual_seed(seed), 0
    squares = {name: torch.zeros(len(ways)).double() for name, ways in options.items()}
    with frozen(model):
        for ids, mask, *_ in batches:
            for name, sums in sample_sums(model, options, ids, mask, generator).items():
                squares[name] += sums.cpu().double().square().sum(0)       # MPS has no float64
            tokens += int(mask.sum())
    if not tokens:
        raise ValueError("there is no batch to measure on (a generator can be read only once)")
    return {name: (sums / tokens / 2).tolist() for name, sums in squares.items()}


def sample_sums(model: Any, options: Mapping[str, Options], input_ids: Tensor,
                attention_mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """sum_t d_t . (dW x_t), (B, O), of each sample of one batch, for each of the modules: the
    backward pass returns them as gradients of zeros that stand in for them. `model` has a decoder
    `.model` under a linear `.lm_head` without a bias."""
    head, sums = model.lm_head.weight, dict[str, Any]()
    mask = attention_mask.to(head.device).bool()
    dtype = torch.promote_types(head.dtype, torch.float32)
    owner = mask.nonzero()[:, 0]             # the sample of each of N real tokens
    with ExitStack() as afterwards, torch.enable_grad():
        for name, ways in options.items():
            weight = model.get_submodule(name).weight
            # No loss depends on these: `_Sums` puts the answers into their gradient.
            sums[name] = mask.new_zeros(len(mask), len(ways), dtype=dtype, requires_grad=True)
            sums[name].grad = torch.zeros_like(sums[name])           # each end adds to it
            for module in model.model.modules():
                if getattr(module, "weight", None) is weight:
                    afterwards.enter_context(module.register_forward_hook(
                        lambda module, inputs, y, shared=(sums[name], mask, ways): _Sums.apply(
                            y, *shared, inputs[0], getattr(module, "embed_scale", 1.0))))
        output = model.model(input_ids=input_ids.to(head.device), attention_mask=mask.long())
        hidden = getattr(output, "last_hidden_state", output)[mask]                    # (N, D)
        of_head = [name for name in options if model.get_submodule(name).weight is head]
        table = head if isinstance(head, Tensor) else head.dense()       # or quantised
        d_hidden, rows = through_head(hidden.detach(), table, [
            change().to(hidden) for name in of_head for change in options[name]], generator)
        for name in of_head:
            sums[name].grad.index_add_(0, owner, rows)
        if hidden.requires_grad:                     # not if the head alone has options
            hidden.backward(d_hidden)
    return {name: each.grad for name, each in sums.items()}


def through_head(hidden: Tensor, head: Tensor, changes: Sequence[Tensor],
                 generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """After each row of hidden (N, D) a token is drawn, CHUNK logits at a time: the gradient (N, D)
    of its negative log-likelihood, and d_t . (dW x_t), (N, O), for each dW (V, D), in its dtype."""
    dtype, gradient = torch.promote_types(head.dtype, torch.float), torch.empty_like(hidden)
    rows = hidden.new_zeros(len(hidden), len(changes), dtype=dtype)
    step = max(1, CHUNK // len(head))
    for part in (slice(n, n + step) for n in range(0, len(hidden), step)):
        x = hidden[part]
        d = F.linear(x, head).to(dtype).softmax(-1)
        tokens = drawn(d, generator)[:, None]
        d.scatter_add_(1, tokens, torch.full_like(tokens, -1, dtype=dtype))    # softmax - one-hot
        gradient[part] = d.to(head.dtype) @ head
        for o, dW in enumerate(changes):
            rows[part, o] = torch.linalg.vecdot(F.linear(x, dW).to(dtype), d)
    return gradient, rows


def drawn(p: Tensor, generator: torch.Generator) -> Tensor:
    """A token (N,) by each row of probabilities (N, V). The generator is always the CPU's."""
    below = p.cumsum(-1)
    u = torch.rand(len(p), 1, generator=generator).to(below) * below[:, -1:]
    return torch.searchsorted(below, u)[:, 0].clamp_(max=p.shape[1] - 1)


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
            rows = rows.new_zeros(*mask.shape, rows.shape[1]).masked_scatter_(mask[..., None], rows)
        return dy, rows.view(*mask.shape, -1).sum(1), None, None, None, None


def few_tokens(tasks: Mapping[str, Sequence[Sequence[Tensor]]]) -> Iterator[Sequence[Tensor]]:
    """The batches of all tasks in turn, in parts of at most AT_ONCE tokens if possible, until they
    have TOKENS."""
    left = TOKENS
    for batch in (b for in_turn in zip_longest(*tasks.values()) for b in in_turn if b):
        lines = max(1, AT_ONCE // batch[1].shape[1])
        for part in zip(*(tensor.split(lines) for tensor in batch)):
            if left > 0:
                left -= int(part[1].sum())
                yield part


def spend(harm: Mapping[str, Sequence[float]], cost: Mapping[str, Sequence[int]], budget: float,
          ) -> dict[str, int]:
    """The number of each module's option: at first the cheapest; then, again and again, the step
    that takes away most harm for its cost, of those that the budget pays. cost: in bytes, or any
    unit. Raises ValueError, with the least possible, for less than that."""
    chosen = {name: costs.index(min(costs)) for name, costs in cost.items()}
    if (least := total(cost, chosen)) > budget:
        raise ValueError(f"{budget} is too small: the least possible is {least}")
    while True:
        left = budget - total(cost, chosen)
        steps = [((harm[name][now] - harm[name][new]) / more, name, new)
                 for name, now in chosen.items() for new in range(len(cost[name]))
                 if 0 < (more := cost[name][new] - cost[name][now]) <= left
                 and harm[name][new] < harm[name][now]]
        if not steps:
            return chosen
        _, name, chosen[name] = max(steps, key=lambda step: step[0])


def total(values: Mapping[str, Sequence[float]], chosen: Mapping[str, int]) -> float:
    """The sum over modules, of the option chosen for each."""
    return sum(values[name][number] for name, number in chosen.items())
