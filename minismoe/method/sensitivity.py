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
from functools import lru_cache, partial
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
    """|| dL_i / dW ||_F^2 (B, M) of each sample of one batch, for each of the modules: in the
    forward pass, `watch` keeps what the norm needs of X; in the backward pass, `write` gets D.
    """
    parameter = next(model.parameters())
    dtype, packed = torch.promote_types(parameter.dtype, torch.float32), packs_tokens(model)
    mask = to_device(attention_mask, parameter.device).bool()
    pairs = mask[:, None] & mask[..., None]                              # (B, T, T)
    row_of = (mask.flatten().cumsum(0) - 1).clamp_(min=0)                # if packed; any of a pad
    norms = torch.zeros(len(modules), len(mask), dtype=dtype, device=parameter.device)

    def by_sample(x: Tensor) -> Tensor:
        """(B, T, .) of what a layer reads or writes; pads hold anything."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.dtype == torch.float16:          # squares of gradients underflow
            rows = rows.float()
        return (rows.index_select(0, row_of) if packed else rows).view(*mask.shape, -1)

    @lru_cache(maxsize=1)                        # q, k and v read the same x
    def gram(x: Tensor) -> Tensor:
        X = by_sample(x)
        return (X @ X.mT).to(dtype) * pairs

    def watch(number: int, layer: Any, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        x, (out, in_) = inputs[0], layer.weight.shape
        use_gram = mask.shape[1] * (in_ + out) < in_ * out
        kept = gram(x) if use_gram else x.detach()

        def write(dy: Tensor) -> None:
            D = by_sample(dy)
            if use_gram:
                left, right = kept, (D @ D.mT).to(dtype)
            else:
                left = right = ((D * mask[..., None]).mT @ by_sample(kept)).to(dtype)
            norms[number] = torch.linalg.vecdot(left.flatten(1), right.flatten(1))

        y.requires_grad_().register_hook(write)  # of the first layers, no input has a gradient

    with ExitStack() as afterwards, torch.enable_grad():
        for number, module in enumerate(modules.values()):
            afterwards.enter_context(module.register_forward_hook(partial(watch, number)))
        _sum_of_means(model, input_ids, attention_mask, labels).backward()
    return norms.mT


def _sum_of_means(model: nn.Module, *batch: Tensor) -> Tensor:
    """The sum over samples of L_i, the mean loss of the supervised tokens of sample i."""
    losses, rows = supervised_losses(model, *batch)
    weights = 1 / torch.bincount(rows)[rows].to(losses.dtype)
    return (losses * to_device(weights, losses.device)).sum()
