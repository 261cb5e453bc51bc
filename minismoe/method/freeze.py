"""Freeze: the mixture of each matrix becomes one plain LoRA of rank R = E*r, and training goes on.

Routing costs a device time and memory, and a merged model has none. So the router of each matrix is
replaced, while the experts are trained, by the best linear map that keeps B:

    A' = A_g + (mean(w (g*h) x^T) - A_g M) (M + ridge I)^-1,      M = mean(w x x^T)

over tokens x of training lines, with h = A x of the stacked experts, g*h each expert's r entries of
h times its gate, and A_g the A whose experts are multiplied by their mean gates, which the ridge
shrinks A' towards. It is optimal for any B (`reference.linear_fit`). A token weighs

    w_t = EVEN + (1 - EVEN) || dL / dy_t ||^2 / mean,             L the loss of the lines' answers

as much as the answers depend on what the matrix writes there. With all w alike, mixtures that were
frozen after training had 0.83 of the toy's answers right; with these w 0.98, and 0.97 before.
Letters: T tokens, E experts of a matrix, r rank of each, R = E*r, D inputs of the matrix.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .experts import ExpertLinear, expert_layers, packs_tokens, top_k_gates
from .hooks import frozen, hooked
from .loss import supervised_losses

RIDGE = 1e-2             # times the mean diagonal of M
EVEN = 0.01              # the part of a token's weight that no answer decides
HELD = 4                 # one line of so many is held out, and says what the fit misses
Weights = dict[ExpertLinear, Tensor]         # of each token, (T,)


def freeze(model: Any, batch: Sequence[Tensor], size: int = 8) -> dict[str, float]:
    """Make each mixture of `model` a plain LoRA, in place: lora_A becomes A', and the router None.

    batch: input_ids, attention_mask and labels (B, T) of training lines, `size` of which are
    differentiated at once. For the fits, all lines go through the decoder together, and each layer
    is fitted as it is reached, so that the inputs of one layer alone are in memory; 64 short lines
    are enough. Parameters stay the same objects, without a gradient.
    Returns {module: share of the mixture's output energy that the LoRA misses on held-out lines}.
    Raises ValueError with the module whose inputs or experts are not finite.
    """
    mixtures = {layer: name for name, layer in expert_layers(model).items()
                if layer.router is not None}
    if not mixtures:
        return {}
    weights = answer_weights(model, mixtures, batch, size)
    input_ids, attention_mask = (t.to(next(model.parameters()).device) for t in batch[:2])
    held = attention_mask.nonzero()[:, 0] % HELD == 1    # (T,), by the line that a token is in
    residuals = dict[str, float]()

    def fit(layer: ExpertLinear, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        x = real_tokens(model, inputs[0], attention_mask).to(layer.lora_A.dtype)
        try:
            A, residuals[mixtures[layer]] = linear_fit(layer, x, weights.pop(layer), held)
        except ValueError as e:
            raise ValueError(f"{mixtures[layer]}: {e}") from None
        layer.lora_A.copy_(A.view_as(layer.lora_A))
        layer.router = layer.router_logits = None

    with torch.no_grad(), frozen(model), hooked(mixtures, fit):
        model.model(input_ids=input_ids, attention_mask=attention_mask)
    return residuals


def real_tokens(model: Any, x: Tensor, attention_mask: Tensor) -> Tensor:
    """The rows (T, .) of real tokens, line by line, of what a layer reads or writes."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if packs_tokens(model) else rows[attention_mask.flatten().bool()]


def answer_weights(model: Any, layers: Iterable[ExpertLinear], batch: Sequence[Tensor], size: int,
                   ) -> Weights:
    """w (T,) of each of the layers, for the tokens of a batch; `size` lines at once."""
    parts: dict[ExpertLinear, list[Tensor]] = {layer: [] for layer in layers}
    for input_ids, attention_mask, labels in zip(*(t.split(size) for t in batch)):
        def watch(layer: ExpertLinear, inputs: tuple[Tensor, ...], y: Tensor,
                  mask: Tensor = attention_mask) -> None:
            def keep(dy: Tensor) -> None:
                d = real_tokens(model, dy, mask.to(dy.device)).to(layer.lora_A.dtype)
                parts[layer].append(d.square().sum(1))
            y.register_hook(keep)

        with torch.enable_grad(), hooked(parts, watch):
            losses, _ = supervised_losses(model, input_ids, attention_mask, labels)
            losses.sum().backward()
    model.zero_grad(set_to_none=True)
    squares = {layer: torch.cat(of_layer) for layer, of_layer in parts.items()}
    return {layer: EVEN + (1 - EVEN) * d / d.mean().clamp(min=1e-30)
            for layer, d in squares.items()}


@torch.no_grad()
def linear_fit(layer: ExpertLinear, x: Tensor, w: Tensor, held: Tensor) -> tuple[Tensor, float]:
    """A' (R, D) of a mixture for tokens x (T, D) with weights w (T,), and its residual.

    held (T,): tokens that judge the fit, and are not fitted. Raises ValueError if a number is not
    finite.
    """
    assert layer.router is not None
    A, B = layer.lora_A.flatten(0, 1), layer.lora_B.flatten(0, 1)
    gates = top_k_gates(x @ layer.router.T, layer.top_k)                                # (T, E)
    root = w.sqrt()[:, None]                 # squares of what it multiplies count w times
    gated = root * ((x @ A.T).unflatten(1, (layer.experts, -1)) * gates[..., None]).flatten(1)
    x = root * x
    X, G = x[~held], gated[~held]
    A_g = A * (w[~held] @ gates[~held] / w[~held].sum()).repeat_interleave(layer.rank)[:, None]
    M = X.T @ X / len(X)
    shift = RIDGE * M.diagonal().mean().clamp(min=1e-30)
    factor = torch.linalg.cholesky_ex(M.diagonal_scatter(M.diagonal() + shift)).L
    A = A_g + torch.cholesky_solve((G.T @ X / len(X) - A_g @ M).T, factor).T
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError("what the mixture reads or writes is not finite: train with --dtype "
                         "float32, or with a lower --lr")
    wanted, given = gated[held] @ B, x[held] @ A.T @ B
    energy = wanted.square().sum()
    return A, ((wanted - given).square().sum() / energy).item() if energy > 0 else 0.0
