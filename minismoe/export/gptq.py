"""GPTQ (arXiv 2210.17323): round a weight so that the layer's outputs change least.

Columns of W are rounded one after another. Those that follow make up for the error of each, as far
as their inputs x correlate with its input, which H = E[x x^T] tells:

    U^T U = (H + damping)^-1        upper triangular
    e_k = (w_k - rounded w_k) / U_kk
    w_j <- w_j - e_k U_kj           for all columns j > k, before they are rounded

Letters: N outputs, K inputs, T tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..io.progress import progress_bar
from ..model.decoder import CausalLM
from ..model.quantize import Blocks, block_scales, dequantize, integers, pack
from ..model.tokens import Tokens
from .weights import PRECISIONS, few_bits

DAMPING = 0.01                   # of H, whose diagonal is scaled to a mean of 1
# A tied matrix is the head, whose inputs have the moments H, and the embedding, whose H would be
# the identity. More damping lies between the two. On SmolLM2 0.03 to 1 were alike.
TIED_DAMPING = 0.3
RIDGE = 0.1                      # times the mean of H's diagonal, where matrices are fitted
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
def refine(teacher: CausalLM, student: CausalLM, blocks: dict[str, Blocks],
           weight: Callable[[str], Tensor], batches: Iterable[Sequence[Tensor]]) -> None:
    """Round the 4-bit weights among `blocks` again, in place, one decoder layer after another.

    Each layer reads what the rounded ones below it write, and its matrices are fitted to what the
    teacher's write (GPTAQ, arXiv 2504.02692). weight(name) reads a weight. student: the model that
    ships, in floats; its weights become the rounded ones. batches: tuples that begin with input_ids
    and attention_mask, each (B, T).
    """
    if not any(found.bits == 4 for found in blocks.values()):
        return
    device, tied = teacher.lm_head.weight.device, teacher.config.tie_word_embeddings
    texts = [Tokens(ids, mask, teacher.config, device, own_tokens(ids, mask))
             for ids, mask, *_ in batches]
    # The arguments of each decoder layer on each text, and the moments of what the head reads.
    arguments, moments = [], torch.zeros((), device=device)
    for text in texts:
        calls, hidden = layer_calls(teacher, text)
        arguments.append(calls)
        moments = moments + hidden.float().T @ hidden.float()
    head = f"{'model.embed_tokens' if tied else 'lm_head'}.weight"
    if blocks[head].bits == 4:
        blocks[head] = gptq(weight(head).to(device), moments, 4, blocks[head].size,
                            TIED_DAMPING if tied else DAMPING)
    round_weights(student, {n: found for n, found in blocks.items() if ".layers." not in n})
    theirs, ours = ([model.model.embedded(text.ids) for text in texts]
                    for model in (teacher, student))
    layers = [*zip(teacher.model.layers, student.model.layers)]
    for number, (their, our) in enumerate(progress_bar(layers, "round", unit="layer")):
        rest = [calls[number] for calls in arguments]
        theirs, sums = layer_sums(their, our, theirs, ours, rest)
        prefix = f"model.layers.{number}."
        for name, (H, missing) in sums.items():
            stored = f"{prefix}{name}.weight"
            W = weight(stored).to(device).float() + fitted(missing, H)
            blocks[stored] = gptq(W, H, 4, blocks[stored].size)
        round_weights(student, {n: b for n, b in blocks.items() if n.startswith(prefix)})
        ours = [our(x, *more) for x, more in zip(ours, rest)]


def layer_calls(model: CausalLM, text: Tokens) -> tuple[list[tuple[Any, ...]], Tensor]:
    """What else each decoder layer is called with than what the one below it wrote; and the hidden
    states that the head reads."""
    calls: list[tuple[Any, ...]] = []
    with ExitStack() as hooks:
        for layer in model.model.layers:
            hooks.enter_context(layer.register_forward_pre_hook(
                lambda layer, args: calls.append(args[1:])))
        return calls, model.model.rows(text)


def layer_sums(their: nn.Module, our: nn.Module, theirs: Sequence[Tensor], ours: Sequence[Tensor],
               rest: Sequence[tuple[Any, ...]],
               ) -> tuple[list[Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """What a layer of the teacher writes of each text; and, for each matrix of the student's layer,
    sums over tokens of x x^T (K, K) and of (what the teacher's writes - y) x^T (N, K), where the
    student's reads x and writes y."""
    written, sums = [], dict[str, tuple[Tensor, Tensor]]()
    for x, y, more in zip(theirs, ours, rest):
        wrote, wanted = linear_calls(their, x, *more)
        written.append(wrote)
        for name, (read, gave) in linear_calls(our, y, *more)[1].items():
            H, missing = sums.get(name, (0, 0))
            sums[name] = H + read.T @ read, missing + (wanted[name][1] - gave).T @ read
    return written, sums


def linear_calls(layer: nn.Module, *arguments: Any,
                 ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """What a decoder layer writes; and x (T, K) and y (T, N), in float32 or better, of each linear
    layer in it, by name."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with ExitStack() as hooks:
        for name, part in layer.named_modules():
            if isinstance(part, nn.Linear):
                hooks.enter_context(part.register_forward_hook(
                    lambda part, args, y, name=name: seen.update({name: tuple(
                        z.flatten(0, -2).float() for z in (args[0], y))})))
        return layer(*arguments), seen


def fitted(missing: Tensor, H: Tensor) -> Tensor:
    """What a matrix lacks (N, K), in the sense of least squares, shrunk towards nothing."""
    H = H.clone()
    H.diagonal().add_(RIDGE * H.diagonal().mean() + 1e-30)
    return torch.cholesky_solve(missing.T.cpu(), torch.linalg.cholesky(H.cpu())).T.to(H.device)


def own_tokens(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The tokens (B, T) after those that all right-padded rows begin with, such as an instruction.
    The last token of each row is its own."""
    real = attention_mask.bool()
    if len(real) == 1:
        return real
    alike = int(((input_ids == input_ids[:1]) & real).all(0).cumprod(0).sum())
    own = real.clone()
    own[:, :min(alike, int(real.sum(1).min()) - 1)] = False
    return own


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
