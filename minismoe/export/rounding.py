"""Few bits: the weights and the experts of a tree become what a graph stores of them."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..io.progress import progress_bar
from ..method.hooks import measuring
from ..model.decoder import CausalLM
from ..model.quantize import Blocks, BlockWeight, quantize
from .bits import Ways, choose_ways
from .gptq import DAMPING, TIED_DAMPING, gptq, gram, inverse_factor, second_moments
from .leaves import EMBEDDING, matrix, put_weight
from .walk import Batches, Walk
from .weights import GraphFormat, Storage

HEAD = "lm_head"


@torch.no_grad()
def round_weights(tree: CausalLM, form: GraphFormat, model: CausalLM, batches: Batches,
                  size: float | None = None) -> None:
    """Store the weights of the tree in few bits, in place. model, batches: see `rounded_options`;
    size: see `choose_ways`."""
    if not form.rounds:
        return
    options = rounded_options(tree, form, model, batches)
    chosen = choose_ways(dict(options), tree, model, batches, size).items() if size else (
        (name, way) for name, ways in options for way in ways.items())
    for name, (storage, blocks) in chosen:
        blocks = blocks or to_nearest(tree.get_submodule(name), storage, form)
        put_weight(tree, name, BlockWeight(blocks, torch.float32))


@torch.no_grad()
def rounded_options(tree: CausalLM, form: GraphFormat, model: CausalLM, batches: Batches,
                    ) -> Iterator[tuple[str, Ways]]:
    """Each weight of the tree by module, layer by layer, in each way that `options_of` allows: in 4
    bits, as blocks rounded for what a model of the same modules, the run's, reads on batches, by
    task, or without any `to_nearest`; None for 8 bits, which `to_nearest` rounds once chosen."""
    with measuring(model):
        walk = Walk(model.model, batches)
        bar = progress_bar(walk.layers(), "round", len(model.model.layers), unit="layer")
        for prefix, _, runs in bar:
            names = [name for name, leaf in tree.named_modules()
                     if name.startswith(f"{prefix}.") and isinstance(leaf, nn.Linear)]
            moments = second_moments({name: model.get_submodule(name) for name in names
                                      if in_4_bits(form, name)},
                                     [run for of_task in runs.values() for run in of_task])
            factors = {H: inverse_factor(H) for H in {*moments.values()}}
            for name in names:
                factor = factors[moments[name]] if name in moments else None
                yield name, rounded(tree, name, form, factor)
        tied, moment = tree.config.tie_word_embeddings, None
        if in_4_bits(form, EMBEDDING if tied else HEAD):
            for x in walk.read_by_head():
                moment = gram(x.float()) + (0 if moment is None else moment)
    factor = None if moment is None else inverse_factor(moment, TIED_DAMPING if tied else DAMPING)
    yield EMBEDDING, rounded(tree, EMBEDDING, form, factor if tied else None)
    if not tied:
        yield HEAD, rounded(tree, HEAD, form, factor)


def in_4_bits(form: GraphFormat, name: str) -> bool:
    """Whether a module may be stored in 4 bits, which are rounded for what the module reads."""
    return any(storage.bits == 4 for storage in form.options_of(name))


def rounded(tree: CausalLM, name: str, form: GraphFormat, factor: Tensor | None) -> Ways:
    """What `rounded_options` says of a module whose inputs have this `inverse_factor`. The blocks
    are computed where the factor is."""
    ways: Ways = dict.fromkeys(form.options_of(name))
    in_4, leaf = [storage for storage in ways if storage.bits == 4], tree.get_submodule(name)
    if factor is None:
        return ways | {storage: to_nearest(leaf, storage, form) for storage in in_4}
    of_sizes = gptq(matrix(leaf).to(factor.device), factor, 4, [size for _, size in in_4])
    return ways | dict(zip(in_4, (replace(
        blocks, data=blocks.data.cpu(), scales=blocks.scales.cpu()) for blocks in of_sizes)))


def to_nearest(leaf: nn.Module, storage: Storage, form: GraphFormat) -> Blocks:
    """The weight (out, in) of a module in few bits, each number rounded to the nearest."""
    return quantize(matrix(leaf), *storage, positive=form.target == "npu" and storage.bits == 8)
