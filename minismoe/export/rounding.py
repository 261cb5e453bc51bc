"""Few bits: the weights and the experts of a tree become what a graph stores of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.tasks import Batch
from ..io.progress import progress_bar
from ..method.experts import expert_layers
from ..method.freeze import evaluating
from ..model.decoder import CausalLM
from ..model.quantize import BlockEmbedding, BlockLinear, Blocks, BlockWeight, quantize
from .gptq import DAMPING, TIED_DAMPING, gptq, second_moments
from .mixture import rounded_experts
from .walk import Walk
from .weights import GraphFormat

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@torch.no_grad()
def round_weights(tree: CausalLM, form: GraphFormat, model: CausalLM,
                  batches: Mapping[str, Sequence[Batch]]) -> None:
    """Store the weights of the tree as `bits_of` says, in place, layer by layer: 4 bits are rounded
    for what a model of the same modules, the run's, reads on batches, by task; without any, to the
    nearest."""
    if not form.rounds:
        return
    with evaluating(model):
        walk = Walk(model.model, batches)
        bar = progress_bar(walk.layers(), "round", len(model.model.layers), unit="layer")
        for prefix, _, runs in bar:
            leaves = {name: leaf for name, leaf in tree.named_modules()
                      if name.startswith(f"{prefix}.") and isinstance(leaf, nn.Linear)}
            moments = second_moments({name: model.get_submodule(name) for name in leaves
                                      if form.bits_of(name).bits == 4},
                                     [run for of_task in runs.values() for run in of_task])
            for name, leaf in leaves.items():
                tree.set_submodule(name, in_blocks(leaf, rounded(
                    leaf, name, form, moments.get(name), DAMPING)))
        tied, moment = tree.config.tie_word_embeddings, None
        if form.bits_of(EMBEDDING if tied else HEAD).bits == 4:
            for x in walk.read_by_head():
                moment = x.float().T @ x.float() + (0 if moment is None else moment)
    embedding, head = tree.model.embed_tokens, tree.lm_head
    stored = BlockWeight(rounded(embedding, EMBEDDING, form, moment if tied else None,
                                 TIED_DAMPING), torch.float32)
    tree.model.embed_tokens = BlockEmbedding(stored)         # type: ignore[assignment]
    tree.lm_head = BlockLinear(stored, None) if tied else in_blocks(
        head, rounded(head, HEAD, form, moment, DAMPING))


def rounded(leaf: Any, name: str, form: GraphFormat, moments: Tensor | None, damping: float,
            ) -> Blocks:
    """The weight (out, in) of a module in few bits, for inputs of these second moments; without
    them, to the nearest. Computed where the moments are."""
    bits, block = form.bits_of(name)
    weight = leaf.weight if moments is None else leaf.weight.to(moments.device)
    blocks = quantize(weight, bits, block, form.target == "npu" and bits == 8) if (
        moments is None) else gptq(weight, moments, bits, block, damping)
    return replace(blocks, data=blocks.data.cpu(), scales=blocks.scales.cpu())


def in_blocks(leaf: nn.Linear, blocks: Blocks) -> nn.Linear:
    """The layer with its weight in blocks; adapters stay beside it."""
    weight = BlockWeight(blocks, torch.float32)
    if type(leaf) is nn.Linear:
        return BlockLinear(weight, leaf.bias)
    del leaf.weight
    leaf.add_module("weight", weight)        # not a parameter any more
    return leaf


def round_experts(tree: CausalLM, form: GraphFormat) -> None:
    """Store the experts of the tree, in place, as a graph of that form does."""
    for name, layer in expert_layers(tree).items():
        tree.set_submodule(name, rounded_experts(layer, name, form))
