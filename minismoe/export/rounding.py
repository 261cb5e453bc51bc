"""Few bits: the weights and the experts of a tree become what a graph stores of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.tasks import Batch
from ..io.progress import progress_bar
from ..method.experts import expert_layers
from ..method.hooks import evaluating
from ..model.decoder import CausalLM
from ..model.quantize import BlockEmbedding, BlockLinear, Blocks, BlockWeight, quantize
from .bits import choose_blocks
from .gptq import DAMPING, TIED_DAMPING, gptq, gram, inverse_factor, second_moments
from .leaves import matrix, with_weight
from .mixture import rounded_experts
from .walk import Walk
from .weights import GraphFormat

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@torch.no_grad()
def round_weights(tree: CausalLM, form: GraphFormat, model: CausalLM,
                  batches: Mapping[str, Sequence[Batch]], size: float | None = None) -> None:
    """Store the weights of the tree in few bits, in place. model, batches: see `rounded_options`;
    size: see `choose_blocks`."""
    if not form.rounds:
        return
    options = rounded_options(tree, form, model, batches)
    for name, blocks in choose_blocks(dict(options), tree, model, batches, size).items() if (
            form.chooses) else ((name, only) for name, (only,) in options):
        store(tree, name, blocks)


@torch.no_grad()
def rounded_options(tree: CausalLM, form: GraphFormat, model: CausalLM,
                    batches: Mapping[str, Sequence[Batch]]) -> Iterator[tuple[str, list[Blocks]]]:
    """Each weight of the tree by module, layer by layer, in few bits, in each way that `options_of`
    allows: 4 bits are rounded for what a model of the same modules, the run's, reads on batches, by
    task; without any, to the nearest."""
    with evaluating(model):
        walk = Walk(model.model, batches)
        bar = progress_bar(walk.layers(), "round", len(model.model.layers), unit="layer")
        for prefix, _, runs in bar:
            leaves = {name: leaf for name, leaf in tree.named_modules()
                      if name.startswith(f"{prefix}.") and isinstance(leaf, nn.Linear)}
            moments = second_moments({name: model.get_submodule(name) for name in leaves
                                      if in_4_bits(form, name)},
                                     [run for of_task in runs.values() for run in of_task])
            factors = {H: inverse_factor(H) for H in {*moments.values()}}
            for name, leaf in leaves.items():
                factor = factors[moments[name]] if name in moments else None
                yield name, rounded(leaf, name, form, factor)
        tied, moment = tree.config.tie_word_embeddings, None
        if in_4_bits(form, EMBEDDING if tied else HEAD):
            for x in walk.read_by_head():
                moment = gram(x.float()) + (0 if moment is None else moment)
    factor = None if moment is None else inverse_factor(moment, TIED_DAMPING if tied else DAMPING)
    yield EMBEDDING, rounded(tree.model.embed_tokens, EMBEDDING, form, factor if tied else None)
    if not tied:
        yield HEAD, rounded(tree.lm_head, HEAD, form, factor)


def in_4_bits(form: GraphFormat, name: str) -> bool:
    """Whether a module may be stored in 4 bits, which are rounded for what the module reads."""
    return any(storage.bits == 4 for storage in form.options_of(name))


def rounded(leaf: Any, name: str, form: GraphFormat, factor: Tensor | None) -> list[Blocks]:
    """The weight (out, in) of a module in few bits, for each option: 4 bits for inputs of this
    `inverse_factor`, computed where it is; 8 bits, and all without a factor, to the nearest."""
    weight, options = matrix(leaf), form.options_of(name)
    in_4: list[Blocks] = []
    if factor is not None:
        weight = weight.to(factor.device)
        in_4 = gptq(weight, factor, 4, [block for bits, block in options if bits == 4])
    blocks = [in_4.pop(0) if bits == 4 and in_4 else
              quantize(weight, bits, block, form.target == "npu" and bits == 8)
              for bits, block in options]
    return [replace(b, data=b.data.cpu(), scales=b.scales.cpu()) for b in blocks]


def store(tree: CausalLM, name: str, blocks: Blocks) -> None:
    """Put blocks in place of the weight of a module; a tied head shares those of the embedding."""
    if name != EMBEDDING:
        leaf: Any = tree.get_submodule(name)
        tree.set_submodule(name, in_blocks(leaf, blocks))
        return
    weight = BlockWeight(blocks, torch.float32)
    tree.set_submodule(name, BlockEmbedding(weight))
    if tree.config.tie_word_embeddings:
        tree.lm_head = BlockLinear(weight, None)


def in_blocks(leaf: nn.Linear, blocks: Blocks) -> nn.Linear:
    """The layer with its weight in blocks; adapters stay beside it."""
    return with_weight(leaf, BlockWeight(blocks, torch.float32))


def round_experts(tree: CausalLM, form: GraphFormat) -> None:
    """Store the experts of the tree, in place, as a graph of that form does."""
    for name, layer in expert_layers(tree).items():
        tree.set_submodule(name, rounded_experts(layer, form))
