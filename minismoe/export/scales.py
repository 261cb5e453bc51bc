"""A quantised model whose scales can be trained: w = e^delta * scale * (q - zero), delta a block.

Integers stay, so the file, the graph and its kernels stay what they are. After
PEQA (arXiv 2305.14152) and the end-to-end stage of EfficientQAT (arXiv 2407.11062).

Letters: N outputs, K inputs, G blocks in a row, T tokens.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..model.decoder import CausalLM
from ..model.quantize import Blocks, dequantize, few_rows
from .weights import CHUNK, PRECISIONS, few_bits


class ScaledWeight(nn.Module):
    """A weight (N, K) in blocks, with a trainable log-scale `delta` (N, G) for each of them."""

    def __init__(self, blocks: Blocks, dtype: torch.dtype):
        super().__init__()
        self.blocks, self.shape, self.dtype = blocks, blocks.shape, dtype
        self.delta = nn.Parameter(torch.zeros_like(blocks.scales))

    @torch.no_grad()
    def rows(self, which: Tensor | slice = slice(None)) -> Tensor:
        """Some rows of the weight, (n, K); default, all."""
        data, scales = self.blocks.data[which], self.trained_scales(which)
        shape = torch.Size((len(data), self.shape[1]))
        return dequantize(replace(self.blocks, shape=shape, data=data, scales=scales), self.dtype)

    def parts(self) -> list[slice]:
        """Slices that cover all rows, each of about CHUNK weights."""
        step = max(1, CHUNK // self.shape[1])
        return [slice(n, n + step) for n in range(0, self.shape[0], step)]

    @torch.no_grad()
    def trained_scales(self, which: Tensor | slice = slice(None)) -> Tensor:
        """The scales of some rows as they are now, (n, G)."""
        return self.blocks.scales[which] * self.delta[which].exp()

    def block_sums(self, gradient: Tensor, w: Tensor) -> Tensor:
        """d delta (n, G) of some rows from d w and w (n, K): the sums over each block of d w * w.

        Writes over the gradient.
        """
        size = self.blocks.size
        x = F.pad(gradient.mul_(w), (0, -w.shape[1] % size)).unflatten(1, (-1, size))
        return x.sum(2, dtype=self.delta.dtype)


class _Multiply(torch.autograd.Function):
    """y = x w^T + b;   dx = dy w,   d delta = block sums of (dy^T x) * w.

    w is made anew for some rows at a time, its gradient for a few: no large table is ever whole.
    Compared with autograd in
    tests/export/test_heal.py::test_gradients_of_scales_equal_autograd, as is `ScaledEmbedding`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight: ScaledWeight, bias: Tensor | None,
                ) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        return torch.cat([F.linear(x, weight.rows(part), None if bias is None else bias[part])
                          for part in weight.parts()], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, sums = ctx.saved_tensors, ctx.weight, []
        flat, dy = x.flatten(0, -2), dy.flatten(0, -2)
        dx = torch.zeros_like(flat, dtype=torch.promote_types(x.dtype, torch.float32))
        for part in weight.parts():
            w, d = weight.rows(part), dy[:, part]
            dx += d @ w
            sums += [weight.block_sums(d[:, few].T @ flat, w[few]) for few in few_rows(w)]
        return dx.view_as(x).to(x.dtype), torch.cat(sums), None, None


class ScaledLinear(nn.Linear):
    """An nn.Linear of a ScaledWeight."""

    def __init__(self, weight: ScaledWeight, bias: Tensor | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.scaled, self.bias = weight, bias                # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return _Multiply.apply(x, self.scaled.delta, self.scaled, self.bias)


class ScaledEmbedding(nn.Module):
    """An nn.Embedding of a ScaledWeight."""

    def __init__(self, weight: ScaledWeight):
        super().__init__()
        self.scaled = weight

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., K)."""
        x, delta = self.scaled.rows(ids.flatten()), F.embedding(ids.flatten(), self.scaled.delta)
        # e^0 = 1 leaves x as it is, and gives delta its gradient: the block sums of dx * x.
        one = (delta - delta.detach()).exp().repeat_interleave(self.scaled.blocks.size, 1)
        return (x * one[:, :x.shape[1]].to(x.dtype)).view(*ids.shape, -1)


def quantize_model(model: CausalLM, weight: Callable[[str], Tensor], precision: str, block: int,
                   ) -> dict[str, Blocks]:
    """The blocks of all weights that a graph quantises, by name; weight(name) reads one of them.

    A tied head is left out: its weight is that of the embedding.
    """
    (bits, table_bits), device = PRECISIONS[precision], model.lm_head.weight.device
    names = [f"{name}.weight" for name, part in model.named_modules()
             if isinstance(part, (nn.Linear, nn.Embedding))
             and not (name == "lm_head" and model.config.tie_word_embeddings)]
    return {name: few_bits(weight(name).to(device), precision,
                           bits if ".layers." in name else table_bits, block) for name in names}


@torch.no_grad()
def round_weights(model: CausalLM, precision: str, block: int,
                  blocks: Mapping[str, Blocks] | None = None) -> CausalLM:
    """Round the weights of the model in place, as a graph of that precision does.

    blocks: those that the graph stores in place of the model's own weights, by weight name.
    """
    blocks = blocks or quantize_model(model, model.get_parameter, precision, block)
    for name, found in blocks.items():
        part: Any = model.get_submodule(name.removesuffix(".weight"))
        dense = dequantize(found, part.weight.dtype).to(part.weight.device)
        part.weight = nn.Parameter(dense, requires_grad=False)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def scale_model(model: CausalLM, blocks: Mapping[str, Blocks], keep: Collection[str] = (),
                ) -> dict[str, ScaledWeight]:
    """Give the model these weights in place of its layers; returns those that can be trained.

    Matrices in `keep` stay mixtures, of rounded weights that are not trained.
    """
    scaled: dict[str, ScaledWeight] = {}
    for name, found in blocks.items():
        part: Any = model.get_submodule(module := name.removesuffix(".weight"))
        if module in keep:
            part.weight = nn.Parameter(dequantize(found, part.weight.dtype), requires_grad=False)
            continue
        weight = scaled[name] = ScaledWeight(found, part.weight.dtype)
        model.set_submodule(module, ScaledEmbedding(weight) if isinstance(part, nn.Embedding)
                            else ScaledLinear(weight, part.bias))
    if model.config.tie_word_embeddings:
        model.lm_head = ScaledLinear(scaled["model.embed_tokens.weight"], None)
    return scaled
