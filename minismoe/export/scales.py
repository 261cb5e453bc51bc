"""A quantised model whose scales can be trained, by the log-scale `delta` of each block.

Integers stay, so the file, the graph and its kernels stay what they are. After
PEQA (arXiv 2305.14152) and the end-to-end stage of EfficientQAT (arXiv 2407.11062).

Letter: K columns of an embedding.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.decoder import CausalLM
from ..model.quantize import BlockLinear, Blocks, BlockWeight, dequantize
from .weights import PRECISIONS, few_bits


class ScaledEmbedding(nn.Module):
    """An nn.Embedding of a BlockWeight; tested against autograd, as `_Multiply` is."""

    def __init__(self, weight: BlockWeight):
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., K)."""
        x, delta = self.weight.dense(ids.flatten()), F.embedding(ids.flatten(), self.weight.delta)
        # e^0 = 1 leaves x as it is, and gives delta its gradient: the block sums of dx * x.
        one = (delta - delta.detach()).exp().repeat_interleave(self.weight.size, 1)
        return (x * one[:, :x.shape[1]].to(x.dtype)).view(*ids.shape, -1)


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


def scale_model(model: CausalLM, blocks: Mapping[str, Blocks]) -> dict[str, BlockWeight]:
    """Give the model these weights, whose scales can be trained, in place of its layers."""
    scaled: dict[str, BlockWeight] = {}
    for name, found in blocks.items():
        part: Any = model.get_submodule(module := name.removesuffix(".weight"))
        weight = scaled[name] = BlockWeight(found, part.weight.dtype, trained=True)
        model.set_submodule(module, ScaledEmbedding(weight) if isinstance(part, nn.Embedding)
                            else BlockLinear(weight, part.bias))
    if model.config.tie_word_embeddings:
        model.lm_head = BlockLinear(scaled["model.embed_tokens.weight"], None)
    return scaled
