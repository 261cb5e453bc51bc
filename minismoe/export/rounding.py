"""Few bits: the weights of a tree become what a graph stores of them."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..model.decoder import CausalLM
from ..model.quantize import Blocks, BlockWeight, quantize
from .bits import Ways
from .gptq import gptq
from .leaves import matrix, put_weight
from .weights import GraphFormat, Storage


@torch.no_grad()
def rounded(leaf: nn.Module, name: str, form: GraphFormat, factor: Tensor | None) -> Ways:
    """The weight of a module in each way that `options_of` allows: in 4 bits, as blocks rounded for
    what it reads, whose `inverse_factor` this is, or without one `to_nearest`; None for 8 bits,
    which `to_nearest` rounds once chosen. The blocks are computed where the factor is."""
    ways: Ways = dict.fromkeys(form.options_of(name))
    in_4 = [storage for storage in ways if storage.bits == 4]
    if factor is None or not in_4:
        return ways | {storage: to_nearest(leaf, storage, form) for storage in in_4}
    of_sizes = gptq(matrix(leaf).to(factor.device), factor, 4, [size for _, size in in_4])
    return ways | dict(zip(in_4, (replace(
        blocks, data=blocks.data.cpu(), scales=blocks.scales.cpu()) for blocks in of_sizes)))


def to_nearest(leaf: nn.Module, storage: Storage, form: GraphFormat) -> Blocks:
    """The weight (out, in) of a module in few bits, each number rounded to the nearest."""
    return quantize(matrix(leaf), *storage, positive=form.target == "npu" and storage.bits == 8)


@torch.no_grad()
def store(tree: CausalLM, form: GraphFormat,
          chosen: Iterable[tuple[str, tuple[Storage, Blocks | None]]]) -> None:
    """Store weights of the tree in few bits, in place, each in one of its ways."""
    for name, (storage, blocks) in chosen:
        blocks = blocks or to_nearest(tree.get_submodule(name), storage, form)
        put_weight(tree, name, BlockWeight(blocks, torch.float32))
