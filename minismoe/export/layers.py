"""The linear layers of a model that ships, beside nn.Linear, BlockLinear and ExpertLinear.

Letters: E experts of a layer, R all their ranks.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method.experts import ExpertLinear
from ..method.freeze import Fit, merged
from ..model.decoder import CausalLM
from ..model.quantize import BlockEmbedding, BlockLinear, BlockWeight

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class MergedWeight(nn.Module):
    """A weight (out, in), and a LoRA that each call of `dense` merges into it, in float32."""

    def __init__(self, base: Any, fit: Fit):
        """base: a Tensor, or a WideWeight."""
        super().__init__()
        self.base, self.fit, self.shape = base, fit, base.shape

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias: (..., in) -> (..., out)."""
        return F.linear(x, self.dense(), bias)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weight (out, in)."""
        base = self.base if isinstance(self.base, Tensor) else self.base.dense()
        return merged(base.float(), self.fit)


class AdapterLinear(nn.Linear):
    """A linear layer, in floats or blocks, with a LoRA of each task, of which a graph takes one at
    run time: inputs `<module>.lora_A` (in, R) and `<module>.lora_B` (R, out)."""

    task: str | None = None                  # whose LoRA is added; None: none

    def __init__(self, linear: nn.Linear, fits: Mapping[str, Fit]):
        """linear: its experts, if it has any, are left out."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.fits = linear.weight, linear.bias, dict(fits)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight: Any = self.weight
        y = F.linear(x, weight if isinstance(weight, Tensor) else weight.dense(), self.bias)
        fit = self.fits[self.task] if self.task is not None else None
        return y if fit is None else y + x @ fit.lora_A.to(x).T @ fit.lora_B.to(x).T


def matrix(leaf: Any) -> Any:
    """The weight of a linear layer or an embedding: a Tensor, or the Blocks that store it."""
    if isinstance(leaf.weight, BlockWeight):
        return leaf.weight.blocks
    return leaf.weight.detach() if isinstance(leaf.weight, Tensor) else leaf.weight.dense()


def routed(layer: nn.Module) -> bool:
    """Whether a layer has several experts."""
    return isinstance(layer, ExpertLinear) and layer.router is not None


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
    A, B = (p.detach().float().cpu().flatten(0, 1) for p in (layer.lora_A, layer.lora_B))
    router = A[:0] if layer.router is None else layer.router.detach().float().cpu()
    return A, (B * layer.scaling).T, router
