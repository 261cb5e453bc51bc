"""Probe: how sensitive each weight matrix is to each task: `reference.sensitivity`, fast.

No gradient of a weight is kept. A linear layer reads X (T, in) of one sample and writes Y (T, out);
with D = dL_i/dY its gradient is dL_i/dW = D^T X, and

    || D^T X ||_F^2 = < X X^T, D D^T >      two T x T products in place of one out x in

(the ghost norm of Li et al. 2022, arXiv 2110.05679; for a long sequence D^T X is cheaper and is
taken). So one batched forward and one backward of activations score every matrix for every sample.
Letters: B samples of a batch, T tokens, M matrices.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .experts import linear_layers, packs_tokens
from .hooks import frozen
from .loss import supervised_losses, to_device


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{module: (out, in)} of every linear layer of `model` but its head."""
    return {name: (m.out_features, m.in_features) for name, m in linear_layers(model).items()}


class Scores(dict[str, dict[str, float]]):
    """{task: {module: sensitivity}}, empty at first. `shapes`: as of `shapes_of`. `samples`:
    {task: squared norms (n, M), a row a sample}."""

    def __init__(self, shapes: dict[str, tuple[int, int]]):
        super().__init__()
        self.shapes = shapes
        self.samples: dict[str, Tensor] = {}

    def add(self, task: str, norms: Tensor) -> None:
        """Add the squared norms (n, M) of n further samples of a task."""
        self.samples[task] = torch.cat([self.samples[task], norms]) if task in self else norms
        self[task] = dict(zip(self.shapes, self.samples[task].sum(0).tolist(), strict=True))

    def to_json(self, model: str) -> dict[str, Any]:
        """The content of sensitivity.json; `model` is the name that it notes."""
        return {"format": "minismoe.sensitivity/1", "model": model, "tasks": {
            task: {"samples": len(self.samples[task]), "scores": scores}
            for task, scores in self.items()}}


def probe(model: nn.Module, tasks: Mapping[str, Iterable[Sequence[Tensor]]]) -> Scores:
    """Score every linear layer of `model` but its head, for every task.

    tasks: batches of (input_ids, attention_mask, labels), each (B, T), labels -100 where
    unsupervised and aligned with input_ids. Tensors on the CPU let our models wait for the device
    only once a batch. The model is left as it was, also after an exception.
    Raises ValueError for a task without a batch.
    """
    scores, layers = Scores(shapes_of(model)), linear_layers(model)
    with frozen(model):
        for task, batches in tasks.items():
            for batch in batches:
                scores.add(task, sample_norms(model, layers, *batch).cpu().double())
            if task not in scores:
                raise ValueError(f"task {task!r} has no batch (a generator can be read only once)")
    return scores


def sample_norms(model: nn.Module, modules: Mapping[str, Any], input_ids: Tensor,
                 attention_mask: Tensor, labels: Tensor) -> Tensor:
    """|| dL_i / dW ||_F^2 (B, M) of each sample of one batch, for each of the modules: the backward
    pass returns them as the gradient of zeros that stand in for them."""
    parameter = next(model.parameters())
    ghost = _Ghost(to_device(attention_mask, parameter.device),
                   torch.promote_types(parameter.dtype, torch.float32), packs_tokens(model))
    with ExitStack() as afterwards, torch.enable_grad():
        afterwards.callback(setattr, ghost, "read", None)        # its graph holds the ghost
        # No loss depends on these: `_Norms` puts the answers into their gradient.
        norms = ghost.mask.new_zeros(len(modules), len(ghost.mask), dtype=ghost.dtype,
                                     requires_grad=True)
        for module, column in zip(modules.values(), norms.unbind()):
            afterwards.enter_context(module.register_forward_hook(partial(_watch, ghost, column)))
        losses, rows = supervised_losses(model, input_ids, attention_mask, labels)
        weights = 1 / torch.bincount(rows)[rows].to(losses.dtype)
        # The sum over samples of their means.
        (losses * to_device(weights, losses.device)).sum().backward()
    assert norms.grad is not None
    return norms.grad.mT


class _Ghost:
    """What the layers share while they see one batch."""

    def __init__(self, attention_mask: Tensor, dtype: torch.dtype, packed: bool):
        self.mask, self.dtype = attention_mask.bool()[..., None], dtype    # (B, T, 1)
        self.pairs = (self.mask & self.mask.mT).to(dtype)                  # (B, T, T)
        self.packed = packed                               # row_of: each position's packed row
        self.row_of = (self.mask.flatten().cumsum(0) - 1).clamp_(min=0)
        self.read: tuple[Tensor, Tensor] | None = None    # last input and its X X^T: q, k, v share

    def gram(self, x: Tensor) -> Tensor:
        """X X^T (B, T, T) of each sample; 0 where a token is a pad."""
        if self.read is not None and self.read[0] is x:
            return self.read[1]
        rows = self.by_sample(x.detach())
        gram = (rows @ rows.mT).to(self.dtype).mul_(self.pairs)
        self.read = x, gram
        return gram

    def by_sample(self, x: Tensor) -> Tensor:
        """(B, T, .) of what a layer reads or writes; pads hold anything."""
        x = x.reshape(-1, x.shape[-1])
        if x.dtype == torch.float16:          # squares of gradients underflow
            x = x.float()
        if self.packed:
            x = x.index_select(0, self.row_of)
        return x.view(*self.mask.shape[:2], -1)


def _watch(ghost: _Ghost, norms: Tensor, module: Any, inputs: tuple[Tensor, ...], output: Tensor,
           ) -> Tensor:
    """A forward hook; returns the output, whose backward pass fills the norms."""
    x, (out, in_) = inputs[0], module.weight.shape
    use_gram = ghost.mask.shape[1] * (in_ + out) < in_ * out
    read = ghost.gram(x) if use_gram else x.detach()
    return _Norms.apply(output, norms, ghost, read, use_gram)


class _Norms(torch.autograd.Function):
    """The identity of y, with || D^T X ||^2 (B,) as the gradient of `norms`. Compared in
    tests/method/test_sensitivity.py::test_equals_the_gradient_of_each_sample."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, norms: Tensor, ghost: _Ghost, read: Tensor, use_gram: bool,
                ) -> Tensor:
        """read: X X^T if that is cheaper, else X."""
        ctx.save_for_backward(read)
        ctx.ghost, ctx.use_gram = ghost, use_gram
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (read,), ghost = ctx.saved_tensors, ctx.ghost
        d = ghost.by_sample(dy)                                            # (B, T, out)
        if ctx.use_gram:
            left, right = read, (d @ d.mT).to(ghost.dtype)
        else:
            left = right = ((d * ghost.mask).mT @ ghost.by_sample(read)).to(ghost.dtype)
        return dy, torch.linalg.vecdot(left.flatten(1), right.flatten(1)), None, None, None
