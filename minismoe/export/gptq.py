"""GPTQ (arXiv 2210.17323): round a weight so that the layer's outputs change least.

Columns of W are rounded one after another. Those that follow make up for the error of each, as far
as their inputs x correlate with its input, which H = E[x x^T] tells:

    U^T U = (H + damping)^-1        upper triangular
    e_k = (w_k - rounded w_k) / U_kk
    w_j <- w_j - e_k U_kj           for all columns j > k, before they are rounded

Letters: N outputs, K inputs, T tokens.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..io.progress import progress_bar
from ..method.freeze import run_hooked
from ..model.decoder import CausalLM
from ..model.quantize import Blocks, block_scales, dequantize, integers, pack
from .weights import PRECISIONS, few_bits

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
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True).to(weight.device)
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


def quantize_model(model: CausalLM, weight: Callable[[str], Tensor], precision: str, block: int,
                   ) -> dict[str, Blocks]:
    """The blocks of all weights that a graph quantises, by name; weight(name) reads one of them.

    A tied head is left out: its weight is that of the embedding.
    """
    (bits, head_bits), device = PRECISIONS[precision], model.lm_head.weight.device
    names = [f"{name}.weight" for name, part in model.named_modules()
             if isinstance(part, (nn.Linear, nn.Embedding))
             and not (name == "lm_head" and model.config.tie_word_embeddings)]
    return {name: few_bits(weight(name).to(device), precision,
                           bits if ".layers." in name else head_bits, block) for name in names}


@torch.no_grad()
def round_weights(model: CausalLM, blocks: Mapping[str, Blocks]) -> CausalLM:
    """Give the model, in place, the weights that a graph stores as `blocks`, by name."""
    for name, found in blocks.items():
        part: Any = model.get_submodule(name.removesuffix(".weight"))
        dense = dequantize(found, part.weight.dtype).to(part.weight.device)
        part.weight = nn.Parameter(dense, requires_grad=False)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
