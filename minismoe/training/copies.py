"""Copies of a model's experts, in its dtype, for as long as a model is trained or evaluated.

The layers' own parameters are what the optimizer has, and whatever path leads through a layer
reaches them. To copy them one by one would start three small kernels for each matrix, and three for
their gradients. So all are copied at once, those of matrices that read the same x side by side (see
`experts.Stack`), and autograd takes the gradients of all copies to the parameters at once. Plainly,
for a group of layers:

    A = cat([lora_A of each layer, padded to E experts]).to(dtype)         (n*E*r, in)
    B = [(scaling * lora_B of each layer, padded alike).to(dtype)]                   (E*r, out) each
    routers = cat([router of each layer, padded to E experts])                       (n*E, in)
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..method.experts import ExpertLinear, Stack, expert_layers, groups


@contextmanager
def multiplying_copies(model: nn.Module) -> Iterator[None]:
    """Meanwhile the layers of `model` multiply with copies, for an evaluation of many parts: those
    of a block around this one, if there is one, or new ones."""
    if any(layer.stack for layer in expert_layers(model).values()):
        yield
    else:
        with Copies(model).multiplying():
            yield


class Group(NamedTuple):
    """Layers that read the same x, and the room that each of them gets in the copies."""

    layers: Sequence[ExpertLinear]
    experts: int             # E, the slots
    rank: int
    top_k: int
    empty: Tensor | None     # as `Stack` has it


class Copies:
    """Copies of the experts of `model`."""

    def __init__(self, model: nn.Module):
        self.layers, self.groups = expert_layers(model), list[Group]()
        self.scaling = next((m.scaling for m in self.layers.values()), 1.0)      # the same in all
        self.zeros = torch.zeros(0)                              # to fill the widest empty slots
        for layers in groups(model):
            E, r, k = (max(getattr(layer, size) for layer in layers)
                       for size in ("experts", "rank", "top_k"))
            counts = torch.tensor([[layer.experts] for layer in layers])
            empty = torch.where(torch.arange(E) < counts, 0.0, -math.inf).flatten()
            self.groups.append(Group(layers, E, r, k, empty.to(layers[0].lora_A)
                                     if counts.min() < E else None))
            widest = max(max(layer.in_features, layer.out_features) for layer in layers)
            self.zeros = layers[0].lora_A.new_zeros(max(len(self.zeros), E * r * widest))

    @contextmanager
    def multiplying(self) -> Iterator[None]:
        """Meanwhile the layers multiply with copies of what their parameters are now."""
        A = self._copied("lora_A", [(g.layers, g.experts * g.rank) for g in self.groups])
        B = self._copied("lora_B", [([layer], g.experts * g.rank)
                                    for g in self.groups for layer in g.layers])
        routers = self._copied("router", [(g.layers, g.experts)
                                          for g in self.groups if g.experts > 1])
        for layers, _, _, top_k, empty in self.groups:
            first = layers[0]
            first.stack = Stack(A[first], [B[layer] for layer in layers], routers.get(first), empty,
                                top_k)
        try:
            yield
        finally:
            for group in self.groups:
                group.layers[0].stack = None

    def _copied(self, part: str, groups: Sequence[tuple[Sequence[ExpertLinear], int]],
                ) -> dict[ExpertLinear, Tensor]:
        """By the first layer of each group, the copy (layers * rows, in or out) of their lora_A,
        lora_B or router; 0 in slots that hold no expert. In the dtype of the weights, but of
        routers; lora_B times scaling. groups: with the rows that each of their layers gets."""
        pieces, shapes = list[Tensor](), dict[ExpertLinear, tuple[int, int]]()
        for layers, rows in groups:
            width = layers[0].out_features if part == "lora_B" else layers[0].in_features
            shapes[layers[0]] = len(layers) * rows, width
            for layer in layers:
                tensor = getattr(layer, part)            # None: one expert has no router
                held = 0 if tensor is None else tensor.numel()
                if held:
                    pieces.append(tensor.flatten())
                if held < rows * width:
                    pieces.append(self.zeros[:rows * width - held])
        if not groups:
            return {}
        together = torch.cat(pieces)
        if part == "lora_B":
            together = together * self.scaling
        if part != "router":
            together = together.to(layer.weight.dtype)
        copies = together.split([*map(math.prod, shapes.values())])
        return {first: copy.view(shape) for (first, shape), copy in zip(shapes.items(), copies)}
