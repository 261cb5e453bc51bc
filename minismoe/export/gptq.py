"""GPTQ (arXiv 2210.17323): round a weight so that the layer's outputs change least.

Columns of W are rounded one after another. Those that follow make up for the error of each, as far
as their inputs x correlate with its input, which H = E[x x^T] tells:

    U^T U = (H + damping)^-1        upper triangular
    e_k = (w_k - rounded w_k) / U_kk
    w_j <- w_j - e_k U_kj           for all columns j > k, before they are rounded

Letters: N outputs, K inputs, T tokens.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..io.progress import progress_bar
from ..method.freeze import run_hooked
from ..model.decoder import CausalLM
from ..model.quantize import Blocks, block_scales, integers, pack

DAMPING = 0.01                   # of H, whose diagonal is scaled to a mean of 1
# A tied matrix is the head, whose inputs have the moments H, and the embedding, whose H would be
# the identity. More damping lies between the two. On SmolLM2 0.03 to 1 were alike.
TIED_DAMPING = 0.3
ROWS = 8192                      # rounded at a time


@torch.no_grad()
def gptq(weight: Tensor, H: Tensor, bits: int, size: int, damping: float = DAMPING) -> Blocks:
    """Blocks of `size` of a weight (N, K) whose inputs have E[x x^T] proportional to H (K, K)."""
    H = H.cpu() / H.diagonal().mean().clamp(min=1e-30).cpu()         # MPS lacks some of these
    H.diagonal().add_(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True).to(weight.device)
    parts = [_rounded(rows.float().clone(), U, bits, size) for rows in weight.split(ROWS)]
    return Blocks(bits, size, weight.shape, *(torch.cat(part) for part in zip(*parts)))


def _rounded(w: Tensor, U: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """data (N, G, size * bits / 8) and scales (N, G) of a weight; writes over it."""
    (N, K), zero = w.shape, 1 << (bits - 1)
    q = torch.full((N, -(-K // size), size), zero, dtype=torch.uint8, device=w.device)
    scales = torch.empty(q.shape[:2], device=w.device)
    for g, start in enumerate(range(0, K, size)):
        end = min(start + size, K)
        block, within = w[:, start:end], U[start:end, start:end]
        scale, errors = block_scales(block, zero), torch.empty_like(block)
        scales[:, g] = scale[:, 0]
        for k in range(end - start):
            column = block[:, k:k + 1]
            q[:, g, k:k + 1] = rounded = integers(column, scale, zero)
            errors[:, k:k + 1] = (column - (rounded - float(zero)) * scale) / within[k, k]
            block[:, k + 1:].addmm_(errors[:, k:k + 1], within[k:k + 1, k + 1:], alpha=-1)
        w[:, end:].addmm_(errors, U[start:end, end:], alpha=-1)
    return pack(q, bits), scales


@torch.no_grad()
def second_moments(model: CausalLM, names: Collection[str], batches: Iterable[Sequence[Tensor]],
                   ) -> dict[str, Tensor]:
    """Sums of x x^T (K, K), in float32, over the tokens x that each of these linear layers reads.

    batches: tuples that begin with input_ids and attention_mask, each (B, T).
    """
    layers: dict[Any, str] = {model.get_submodule(name): name for name in names}
    device = model.lm_head.weight.device
    sums = {name: torch.zeros(layer.in_features, layer.in_features, device=device)
            for layer, name in layers.items()}

    last: list[Any] = [None, None]           # q, k and v read the same x, and so do gate and up

    def hook(layer: Any, args: tuple[Tensor, ...], y: Any) -> None:
        if args[0] is not last[0]:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            last[:] = args[0], x.T @ x
        sums[layers[layer]] += last[1]

    for batch in batches:
        hidden = run_hooked(model.model, batch, [m for m in layers if m is not model.lm_head], hook)
        if model.lm_head in layers:
            hook(model.lm_head, (hidden[batch[1].bool()],), None)
    return sums


def refine(model: CausalLM, blocks: dict[str, Blocks], weight: Callable[[str], Tensor],
           batches: Sequence[Sequence[Tensor]], memory: int = 1 << 30) -> None:
    """Round the 4-bit weights among `blocks` again, in place, for what `model` reads on batches.

    weight(name) reads a weight. A pass over the batches takes layers whose H fit `memory` bytes.
    """
    tied = model.config.tie_word_embeddings
    names = {name: f"{'model.embed_tokens' if tied and name == 'lm_head' else name}.weight"
             for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    few = [n for n, stored in names.items() if stored in blocks and blocks[stored].bits == 4]
    groups, room = list[list[str]](), 0
    for name in few:
        if (size := 4 * blocks[names[name]].shape[1] ** 2) > room:
            groups.append([])
            room = memory
        groups[-1].append(name)
        room -= size
    with progress_bar(total=len(few), desc="round", unit="matrix", disable=not few) as bar:
        for group in groups:
            for name, H in second_moments(model, group, batches).items():
                stored = names[name]
                blocks[stored] = gptq(weight(stored).to(H.device), H, 4, blocks[stored].size,
                                      TIED_DAMPING if tied and name == "lm_head" else DAMPING)
                bar.update()
