"""GPTQ (arXiv 2210.17323): round a weight so that the layer's outputs change least.

Columns of W are rounded one after another. Those that follow make up for the error of each, as far
as their inputs x correlate with its input, which H = E[x x^T] tells:

    U^T U = (H + damping)^-1        U is upper triangular: the inverse of the Cholesky factor of
                                    H + damping, both with rows and columns in reverse order
    e_k = (w_k - rounded w_k) / U_kk
    w_j <- w_j - e_k U_kj           for all columns j > k, before they are rounded

Letters: N outputs, K inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.quantize import Blocks, block_scales, integers, pack

# Of H, whose diagonal is scaled to a mean of 1. A few thousand tokens show H only roughly, so more
# than the paper's 0.01, which left up to twice the divergence on two converged runs of SmolLM2.
DAMPING = 0.1
# A tied matrix is the head, whose inputs have the moments H, and the embedding, whose H would be
# the identity. More damping lies between the two. On SmolLM2 0.03 to 1 were alike.
TIED_DAMPING = 0.3
ROWS = 8192                      # rounded at a time


@torch.no_grad()
def inverse_factor(H: Tensor, damping: float = DAMPING) -> Tensor:
    """U (K, K), for inputs whose E[x x^T] is proportional to H (K, K)."""
    device, mean = H.device, H.diagonal().mean().clamp(min=1e-30).cpu()
    H = H.cpu().flip(0, 1).div_(mean)        # MPS lacks Cholesky
    H.diagonal().add_(damping)
    L, one = torch.linalg.cholesky(H), torch.eye(len(H), out=H)      # K^2 floats may be many
    return torch.linalg.solve_triangular(L, one, upper=False).flip(0, 1).to(device)


@torch.no_grad()
def gptq(weight: Tensor, U: Tensor, bits: int, sizes: Sequence[int]) -> list[Blocks]:
    """A weight (N, K) in blocks of each of these sizes, which are multiples of the smallest, for
    inputs of this `inverse_factor`."""
    parts = [_rounded(rows, U, bits, sizes) for rows in weight.split(ROWS)]
    return [Blocks(bits, size, weight.shape, *(torch.cat(part) for part in zip(*of_size)))
            for size, of_size in zip(sizes, zip(*parts))]


def _rounded(weight: Tensor, U: Tensor, bits: int, sizes: Sequence[int],
             ) -> list[tuple[Tensor, Tensor]]:
    """data (N, G, size * bits / 8) and scales (N, G) for each size. The columns of all sizes are
    rounded side by side, so that each step is one operation."""
    (N, K), S, zero, step = weight.shape, len(sizes), 1 << (bits - 1), min(sizes)
    w = weight.T.float()[:, None].repeat(1, S, 1)        # (K, S, N): what a step reads is near
    longest = max(-(-K // size) * size for size in sizes)
    q = torch.full((longest, S, N), zero, dtype=torch.uint8, device=w.device)
    scale, scales = torch.empty(S, N, device=w.device), [list[Tensor]() for _ in sizes]
    for start in range(0, K, step):
        end = min(start + step, K)
        for s, size in enumerate(sizes):
            if start % size == 0:
                scale[s] = block_scales(w[start:start + size, s].T, zero)[:, 0]
                scales[s].append(scale[s].clone())
        block, within = w[start:end], U[start:end, start:end]
        errors = torch.empty_like(block)
        for k in range(end - start):
            q[start + k] = rounded = integers(block[k], scale, zero)
            errors[k] = (block[k] - (rounded - float(zero)) * scale) / within[k, k]
            block[k + 1:].flatten(1).addr_(within[k, k + 1:], errors[k].flatten(), alpha=-1)
        w[end:].flatten(1).addmm_(U[start:end, end:].T, errors.flatten(1), alpha=-1)
    return [(pack(q[:len(of_size) * size, s].T.reshape(N, -1, size), bits), torch.stack(of_size, 1))
            for s, (size, of_size) in enumerate(zip(sizes, scales))]
