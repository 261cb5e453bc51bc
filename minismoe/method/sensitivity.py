"""Formula 1: how sensitive each weight matrix is to each task, from gradients of a few samples.

    s[t, W] = sum over the samples i of task t of  || dL_i / dW ||_F^2

L_i is sample i's mean loss over its supervised tokens, and W stays as it is (LoRA-SMoE, Xu and Diao
2025, arXiv 2505.06272). The gradient itself is never formed. With X (T, in) what a linear layer
reads of one sample and D (T, out) the gradient of L_i at what it writes, dL_i/dW = D^T X, and

    || D^T X ||_F^2 = < X X^T, D D^T >

which needs two products of T x T instead of one of out x in (the ghost norm of Li et al. 2022,
arXiv 2110.05679). So one batched forward and one backward that stops at activations score every
matrix for every sample. Where a sequence is long, D^T X is cheaper after all, and is taken.

Letters: B samples of a batch, T tokens, M matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .experts import linear_layers
from .loss import supervised_losses

Batch = Sequence[Tensor]                     # input_ids, attention_mask, labels, each (B, T)


class Scores(dict[str, dict[str, float]]):
    """{task: {module: sensitivity}}, with what else the probe knows.

    shapes: {module: (out, in)}. samples: {task: (n, M)} squared norms of every single sample.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]]):
        super().__init__()
        self.shapes = shapes
        self.samples: dict[str, Tensor] = {}

    def add(self, task: str, norms: Tensor) -> None:
        """Take in the squared norms (n, M) of n further samples of a task."""
        self.samples[task] = torch.cat([self.samples[task], norms]) if task in self else norms
        self[task] = dict(zip(self.shapes, self.samples[task].sum(0).tolist(), strict=True))

    def to_json(self, model: str) -> dict[str, Any]:
        """The content of sensitivity.json; `model` is the name to note there."""
        return {"format": "minismoe.sensitivity/1", "model": model, "tasks": {
            task: {"samples": len(self.samples[task]), "scores": scores}
            for task, scores in self.items()}}


def probe(model: nn.Module, tasks: Mapping[str, Iterable[Batch]], scores: Scores | None = None,
          progress: Callable[[int], Any] = lambda samples: None) -> Scores:
    """Score every linear layer of `model` but its head, for every task.

    tasks: batches of (input_ids, attention_mask, labels), each (B, T), labels -100 where
    unsupervised and aligned with input_ids. With `scores` of an earlier call the samples add up.
    The model is left as it was: weights, requires_grad, mode and hooks, also after an exception.
    Raises ValueError for a task without a batch.
    """
    modules = linear_layers(model)
    if scores is None:
        scores = Scores({n: (m.weight.shape[0], m.weight.shape[1]) for n, m in modules.items()})
    with _frozen(model):
        for task, batches in tasks.items():
            for batch in batches:
                scores.add(task, sample_norms(model, modules, *batch).cpu().double())
                progress(len(batch[0]))
            if task not in scores:
                raise ValueError(f"task {task!r} has no batch (a generator gives its own once)")
    return scores


def sample_norms(model: nn.Module, modules: Mapping[str, nn.Module], input_ids: Tensor,
                 attention_mask: Tensor, labels: Tensor) -> Tensor:
    """|| dL_i / dW ||_F^2 (B, M) of each sample of one batch, for each of the modules."""
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    ghost = _Ghost(attention_mask, len(modules), dtype)
    hooks = [m.register_forward_hook(ghost.watch(i)) for i, m in enumerate(modules.values())]
    try:
        with torch.enable_grad():
            losses, rows = supervised_losses(model, input_ids, attention_mask, labels)
            tokens = torch.bincount(rows, minlength=len(input_ids))
            (losses / tokens[rows]).sum().backward()      # the sum over samples of their means
    finally:
        for hook in hooks:
            hook.remove()
    return ghost.norms


class _Ghost:
    """Pairs what a linear layer reads, in the forward pass, with the gradient at what it writes."""

    def __init__(self, attention_mask: Tensor, modules: int, dtype: torch.dtype):
        self.mask = attention_mask.bool()[..., None]                       # (B, T, 1)
        self.pairs = (self.mask & self.mask.mT).to(dtype)                  # (B, T, T)
        self.places = (self.mask.flatten().cumsum(0) - 1).clamp_(min=0)    # among the real tokens
        self.norms = torch.zeros(len(self.mask), modules, dtype=dtype, device=self.mask.device)
        self.read: tuple[Tensor, Tensor] | None = None    # last input and its X X^T: q, k, v share

    def watch(self, column: int) -> Callable[..., None]:
        """A forward hook that scores its layer when the backward pass comes by."""
        def forward_hook(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            """Keep X, or X X^T where that is cheaper, until D comes by."""
            x, (out, in_) = inputs[0].detach(), tuple(module.weight.shape)
            if use_gram := self.mask.shape[1] * (in_ + out) < in_ * out:
                if self.read is None or self.read[0] is not inputs[0]:
                    x = self.by_sample(x)
                    self.read = inputs[0], (x @ x.mT).to(self.norms.dtype).mul_(self.pairs)
                x = self.read[1]                                           # (B, T, T)

            def backward_hook(gradient: Tensor) -> None:
                d = self.by_sample(gradient)                               # (B, T, out)
                left, right = (x, d @ d.mT) if use_gram else 2 * (
                    (d * self.mask).mT @ self.by_sample(x),)
                self.norms[:, column] += torch.linalg.vecdot(
                    *(side.flatten(1).to(self.norms.dtype) for side in (left, right)))

            if not output.requires_grad:      # nothing before the first layer needs a gradient
                output.requires_grad_()
            output.register_hook(backward_hook)
        return forward_hook

    def by_sample(self, x: Tensor) -> Tensor:
        """(B, T, .) of rows that hold every position, or only the real ones: at pads, any."""
        x = x.reshape(-1, x.shape[-1])
        if x.dtype == torch.float16:          # squares of gradients underflow
            x = x.float()
        if len(x) != len(self.places):
            x = x.index_select(0, self.places)
        return x.view(*self.mask.shape[:2], -1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient, and dropout is off; afterwards all is as before."""
    asked = {p: p.requires_grad for p in model.parameters()}
    modes = {m: m.training for m in model.modules()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in asked.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


def overlap(samples: Tensor, names: Sequence[str],
            select: Callable[[dict[str, float]], set[str]]) -> float:
    """Split-half overlap: how far the selected matrices of a task depend on the samples drawn.

    samples (n, M) are squared norms; even and odd samples each select matrices by their sums, and
    the share of one selection that is in the other comes back; nan for a single sample. Where
    `select` takes a share p of the matrices, chance alone gives p.
    """
    if len(samples) < 2:
        return math.nan
    halves = [select(dict(zip(names, samples[i::2].sum(0).tolist(), strict=True)))
              for i in (0, 1)]
    return len(halves[0] & halves[1]) / max(1, len(halves[0]))
