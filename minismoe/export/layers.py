"""The linear layers of a model that ships, beside nn.Linear, BlockLinear and ExpertLinear.

Letters: E experts of a layer, R all their ranks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method.experts import ExpertLinear, merged
from ..model.decoder import CausalLM
from ..model.quantize import BlockEmbedding, BlockLinear, BlockWeight

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class MergedWeight(nn.Module):
    """A weight (out, in), and experts that each call of `dense` merges into it, in float32."""

    def __init__(self, base: Any, layer: ExpertLinear):
        """base: a Tensor, or a WideWeight. layer: without a router."""
        super().__init__()
        self.base, self.shape, self.experts = base, base.shape, [layer]      # no module of ours

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias: (..., in) -> (..., out)."""
        return F.linear(x, self.dense(), bias)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weight (out, in)."""
        base = self.base if isinstance(self.base, Tensor) else self.base.dense()
        return merged(base.float(), self.experts[0])


def matrix(leaf: Any) -> Any:
    """The weight of a linear layer or an embedding: a Tensor, or the Blocks that store it."""
    if isinstance(leaf.weight, BlockWeight):
        return leaf.weight.blocks
    return leaf.weight.detach() if isinstance(leaf.weight, Tensor) else leaf.weight.dense()


def vocabularies(model: CausalLM) -> list[str]:
    """The modules that hold a table of the vocabulary: that of the head first."""
    return [EMBEDDING] if model.config.tie_word_embeddings else [HEAD, EMBEDDING]


def put_weight(model: CausalLM, name: str, weight: Any) -> None:
    """Give a linear layer or the embedding, in place, a weight that is computed when it is needed;
    adapters stay beside it. A tied head shares the embedding's."""
    leaf: Any = model.get_submodule(name)
    if name == EMBEDDING:
        model.set_submodule(name, BlockEmbedding(weight))
        if model.config.tie_word_embeddings:
            model.lm_head = BlockLinear(weight, None)
    elif type(leaf) in (nn.Linear, BlockLinear):
        model.set_submodule(name, BlockLinear(weight, leaf.bias))
    else:
        del leaf.weight
        leaf.add_module("weight", weight)    # no parameter any more


def flat(layer: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """lora_A (R, in), lora_B (out, R) with the scaling, router (E, in), or (0, in) without one; R
    is 0 without experts."""
    if not isinstance(layer, ExpertLinear):
        A = torch.zeros(0, layer.in_features)
        return A, torch.zeros(layer.out_features, 0), A
    A, B = (part.float().cpu() for part in layer.lora())
    router = A[:0] if layer.router is None else layer.router.detach().float().cpu()
    return A, B, router
