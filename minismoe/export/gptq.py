"""GPTQ (arXiv 2210.17323): round a weight so that the layer's outputs change least.

Columns of W are rounded one after another. Those that follow make up for the error of each, as far
as their inputs x correlate with its input, which H = E[x x^T] tells:

    U^T U = (H + damping)^-1        U is upper triangular: the inverse of the Cholesky factor of
                                    H + damping, both with rows and columns in reverse order
    e_k = (w_k - rounded w_k) / U_kk
    w_j <- w_j - e_k U_kj           for all columns j > k, before they are rounded

Letters: N outputs, K inputs, T tokens.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..method.freeze import Run
from ..method.hooks import hooked
from ..model.quantize import Blocks, block_scales, integers, pack

# Of H, whose diagonal is scaled to a mean of 1. A few thousand tokens show H only roughly, so more
# than the paper's 0.01, which left up to twice the divergence on two converged runs of SmolLM2.
DAMPING = 0.1
# A tied matrix is the head, whose inputs have the moments H, and the embedding, whose H would be
# the identity. More damping lies between the two. On SmolLM2 0.03 to 1 were alike.
TIED_DAMPING = 0.3
ROWS = 8192                      # rounded at a time


@torch.no_grad()
def gptq(weight: Tensor, H: Tensor, bits: int, size: int, damping: float = DAMPING) -> Blocks:
    """Blocks of `size` of a weight (N, K) whose inputs have E[x x^T] proportional to H (K, K)."""
    H = H.cpu() / H.diagonal().mean().clamp(min=1e-30).cpu()         # MPS lacks some of these
    H.diagonal().add_(damping)
    L, one = torch.linalg.cholesky(H.flip(0, 1)), torch.eye(len(H), dtype=H.dtype)
    U = torch.linalg.solve_triangular(L, one, upper=False).flip(0, 1).to(weight.device)
    parts = [_rounded(rows, U, bits, size) for rows in weight.split(ROWS)]
    return Blocks(bits, size, weight.shape, *(torch.cat(part) for part in zip(*parts)))


def _rounded(weight: Tensor, U: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """data (N, G, size * bits / 8) and scales (N, G) of a weight."""
    (N, K), G, zero = weight.shape, -(-weight.shape[1] // size), 1 << (bits - 1)
    w = weight.T.float().clone(memory_format=torch.contiguous_format)    # what a step reads is near
    q = torch.full((G * size, N), zero, dtype=torch.uint8, device=w.device)
    scales = torch.empty(G, N, device=w.device)
    for g, start in enumerate(range(0, K, size)):
        end = min(start + size, K)
        block, within = w[start:end], U[start:end, start:end]
        scales[g] = scale = block_scales(block.T, zero)[:, 0].contiguous()
        errors = torch.empty_like(block)
        for k in range(end - start):
            q[start + k] = rounded = integers(block[k], scale, zero)
            errors[k] = (block[k] - (rounded - float(zero)) * scale) / within[k, k]
            block[k + 1:].addr_(within[k, k + 1:], errors[k], alpha=-1)
        w[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    return pack(q.T.reshape(N, G, size), bits), scales.T.contiguous()


@torch.no_grad()
def second_moments(layers: Mapping[str, nn.Module], runs: Iterable[Run]) -> dict[str, Tensor]:
    """Sums of x x^T (K, K), in float32, over the tokens x that each of these linear layers reads
    in some runs, which give them rows of real tokens alone."""
    names = {layer: name for name, layer in layers.items()}
    sums: dict[str, Tensor] = {}
    last: list[Any] = [None, None]           # q, k and v read the same x, and so do gate and up

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        if inputs[0] is not last[0]:
            last[:] = inputs[0], gram(inputs[0].reshape(-1, inputs[0].shape[-1]).float())
        name = names[layer]
        sums[name] = sums[name] + last[1] if name in sums else last[1]

    with hooked(layers.values(), hook):
        for _, run in runs:
            run()
    return sums


def gram(x: Tensor) -> Tensor:
    """x^T x (K, K) of x (T, K); what lies below the diagonal is copied from above it."""
    K = x.shape[1]
    product = x.new_empty(K, K)
    for start in range(0, K, step := max(256, -(-K // 4))):
        end = min(start + step, K)
        torch.mm(x[:, start:end].T, x[:, start:], out=product[start:end, start:])
        product[end:, start:end] = product[start:end, end:].T
    return product
