"""Token weights: how much the answers depend on what a matrix writes at each token.

A rounded matrix writes y_t + e_t in place of y_t. What it is rounded for, the sum of ||e_t||^2 over
tokens t, counts an error of any token alike, wherever it leads. So each is multiplied by

    w_t = sum over answer positions p of || dL_p / dy_t ||^2,    L_p = m_p sigmoid(-m_p / 4)

where m_p is the margin, in logits, of the likeliest next token over the second, and the sigmoid is
held constant: the smaller a margin, the sooner an error changes the answer. GuidedQuant (arXiv
2505.07004) takes the gradient of the training loss, which almost vanishes at lines that a model has
learned. One backward pass estimates the sum: with d_p = dL_p / dy_t and random signs s_p, the
expectation of ||sum_p s_p d_p||^2 is sum_p ||d_p||^2. The signs are drawn once.
Letters: N rows of tokens, S answer positions, D hidden.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import hooked
from .loss import CHUNK


def token_weights(layers: Iterable[nn.Module], head: Any, run: Callable[[], Tensor], at: Tensor,
                  signs: Tensor) -> dict[nn.Module, Tensor]:
    """w (N,) of each of the linear layers, and of the head.

    run: computes what the head reads, (N, D), by the layers, from an input that asks for a
    gradient. at (S,): the rows of answer positions, each as often as sequences hold it. signs (S,):
    1 or -1, drawn at random.
    """
    weights = dict[nn.Module, Tensor]()

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        y.register_hook(lambda dy: weights.update({layer: squares(dy)}))

    with torch.enable_grad(), hooked(layers, hook):
        hidden = run()
        read = hidden.detach().requires_grad_()
        weights[head] = squares(hidden.detach()[:, :0])                  # zeros
        step = max(1, CHUNK // 4 // head.out_features)       # logits, in two dtypes, and gradients
        for rows, of_rows in zip(at.split(step), signs.split(step)):
            logits = head(read[rows])
            first, second = logits.to(torch.promote_types(logits.dtype, torch.float32)).topk(
                2).values.unbind(1)
            margins = first - second
            loss = (of_rows * margins * torch.sigmoid(-margins / 4).detach()).sum()
            logits.retain_grad()
            loss.backward()
            weights[head].index_add_(0, rows, squares(logits.grad))
        hidden.backward(read.grad)
    return weights


def squares(rows: Tensor) -> Tensor:
    """The squared norms (N,) of rows (N, ...), in float32 or better."""
    rows = rows.flatten(0, -2).to(torch.promote_types(rows.dtype, torch.float32))
    return torch.linalg.vecdot(rows, rows)
