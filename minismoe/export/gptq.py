"""GPTQ (arXiv 2210.17323): round a weight so that the layer's outputs change least.

Columns of W are rounded one after another. Those that follow make up for the error of each, as far
as their inputs x correlate with its input, which H = sum x x^T tells:

    R R^T = H + damping, R upper triangular;   U = R^-1
    e_k = (w_k - rounded w_k) / U_kk
    w_j <- w_j - e_k U_kj           for all columns j > k, before they are rounded

A block's scale is chosen as its first column is reached (`block_scales`). What all columns before a
block [a, b) add up to needs no inverse of K x K: the errors e, times U, are W - rounded W, so

    w[a:b] = W[a:b] + (W - rounded W)[:a] R[:a, a:b] U[a:b, a:b]

Letters: T tokens, N outputs, K inputs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method.hooks import gram
from ..model.quantize import Blocks, block_scales, pack

# Of H, whose diagonal is scaled to a mean of 1. A few thousand tokens show H only roughly, so more
# than the paper's 0.01, which left up to twice the divergence on two converged runs of SmolLM2.
DAMPING = 0.1
# A tied matrix is the head, whose inputs have the moments H, and the embedding, whose H would be
# the identity. More damping lies between the two. On SmolLM2 0.03 to 1 were alike.
TIED_DAMPING = 0.3
ROWS = 8192                      # rounded at a time


@torch.no_grad()
def factor(x: Tensor, damping: float = DAMPING) -> Tensor:
    """R (K, K), upper triangular, for inputs x (T, K)."""
    H = gram(x.flip(1))                      # R is the lower factor of H, both in reverse order
    H.div_(H.diagonal().mean().clamp(min=1e-30))
    H.diagonal().add_(damping)
    return torch.linalg.cholesky(H).flip(0, 1)


@torch.no_grad()
def gptq(weights: Sequence[Tensor], R: Tensor, bits: int, size: int) -> list[Blocks]:
    """Weights (N, K) in blocks of this size, on the CPU, for inputs of this `factor`, which they
    share: their rows are rounded side by side."""
    parts = (_rounded(rows.to(R.device), R, bits, size)
             for rows in torch.cat([*weights]).split(ROWS))
    lengths = [len(weight) for weight in weights]
    data, scales = (torch.cat(part).cpu().split(lengths) for part in zip(*parts))
    return [Blocks(bits, size, *own) for own in zip([w.shape for w in weights], data, scales)]


def _rounded(weight: Tensor, R: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """data (N, G, size * bits / 8) and scales (N, G) of a weight (N, K)."""
    (N, K), zero = weight.shape, 1 << (bits - 1)
    W = weight.T.float().contiguous()        # (K, N): each step reads a row
    error, q, scales = torch.empty_like(W), torch.empty_like(W, dtype=torch.uint8), list[Tensor]()
    for a in range(0, K, size):
        b = min(a + size, K)
        U = torch.linalg.solve_triangular(R[a:b, a:b], torch.eye(b - a).to(W), upper=True)
        w = torch.addmm(W[a:b], (R[:a, a:b] @ U).T, error[:a])
        scales.append(block_scales(w.T, zero)[:, 0])
        w /= scales[-1]
        spread = U / U.diagonal()[:, None]
        for k in range(b - a):
            rounded = w[k].round().clamp_(-zero, zero - 1)
            w[k + 1:].addr_(spread[k, k + 1:], w[k] - rounded, alpha=-1)
            w[k] = rounded
        q[a:b] = w + zero
        torch.addcmul(W[a:b], w, scales[-1], value=-1, out=error[a:b])
    padded = F.pad(q.T, (0, -K % size), value=zero)
    return pack(padded.reshape(N, -1, size), bits), torch.stack(scales, 1)
