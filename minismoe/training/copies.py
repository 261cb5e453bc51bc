"""Copies of a model's experts, in its dtype, for as long as a model is trained or evaluated.

The layers' own parameters are what the optimizer has, and whatever path leads through a layer
reaches them. To copy them one by one would start three small kernels for each matrix, and three for
their gradients. So all are copied at once, those of matrices that read the same x side by side (see
`experts.Stack`), and autograd takes the gradients of all copies to the parameters at once.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method.experts import ExpertLinear, Stack, expert_layers, groups

# The layers whose parameters one copy holds, and the slots E and the rank r that each has in it.
Block = tuple[Sequence[ExpertLinear], int, int]


class Copies:
    """Copies of the experts of `model`.

    same_shapes: pad the copies to equal shapes in all decoder layers, so that a compiler makes one
    graph for all layers.
    """

    def __init__(self, model: nn.Module, same_shapes: bool = False):
        self.groups, self.layers = groups(model), expert_layers(model)
        names = {layer: name for name, layer in self.layers.items()}
        keys = [names[group[0]] for group in self.groups]
        if same_shapes:
            keys = [re.sub(r"\d+", "*", key) for key in keys]
        sharing = defaultdict[str, list[ExpertLinear]](list)     # layers that get as many slots
        for key, group in zip(keys, self.groups):
            sharing[key] += group
        self.scaling = next((m.scaling for m in self.layers.values()), 1.0)      # the same in all
        self.zeros = torch.zeros(0)                              # to fill the widest empty slots
        self.sizes: list[tuple[int, int, int]] = []              # of each group: E, r, top_k
        self.empty: list[Tensor | None] = []                     # of each group, as Stack has it
        for key, group in zip(keys, self.groups):
            E, r, k = (max(getattr(layer, size) for layer in sharing[key])
                       for size in ("experts", "rank", "top_k"))
            self.sizes.append((E, r, k))
            lacking = torch.arange(E) >= torch.tensor([[layer.experts] for layer in group])
            self.empty.append(None if all(layer.experts == E for layer in sharing[key]) else
                              torch.zeros(lacking.shape).masked_fill_(lacking, -math.inf).flatten()
                              .to(group[0].lora_A))
            self.zeros = group[0].lora_A.new_zeros(max(self.zeros.numel(), E * r * max(
                max(layer.in_features, layer.out_features) for layer in group)))

    @contextmanager
    def multiplying(self) -> Iterator[None]:
        """Meanwhile the layers multiply with copies of what their parameters are now."""
        sized = [(group, E, r) for group, (E, r, _) in zip(self.groups, self.sizes)]
        A = self._copied("lora_A", sized)
        B = self._copied("lora_B", [([layer], E, r) for group, E, r in sized for layer in group])
        routers = self._copied("router", [(group, E, 1) for group, E, _ in sized if E > 1])
        for group, (E, _, top_k), empty in zip(self.groups, self.sizes, self.empty):
            group[0].stack = Stack(next(A), [next(B) for _ in group],
                                   next(routers) if E > 1 else None, empty, top_k)
        try:
            yield
        finally:
            for group in self.groups:
                group[0].stack = None

    def _copied(self, part: str, blocks: Sequence[Block]) -> Iterator[Tensor]:
        """The copy (layers * E * r, in or out) of each block's lora_A, lora_B or router; 0 in slots
        that hold no expert. In the dtype of the weights, but of routers; lora_B times scaling."""
        pieces, shapes = list[Tensor](), list[tuple[int, int]]()
        for layers, E, r in blocks:
            width = layers[0].out_features if part == "lora_B" else layers[0].in_features
            shapes.append((len(layers) * E * r, width))
            for layer in layers:
                if (tensor := getattr(layer, part)) is None:     # one expert: no router
                    pieces.append(self.zeros[:E * width])
                    continue
                if part != "router" and layer.rank < r:
                    tensor = F.pad(tensor, (0, 0, 0, r - layer.rank))
                pieces.append(tensor.flatten())
                if layer.experts < E:
                    pieces.append(self.zeros[:(E - layer.experts) * r * width])
        if not blocks:
            return
        together = torch.cat(pieces)
        if part == "lora_B":
            together = together * self.scaling
        if part != "router":
            together = together.to(layer.weight.dtype)
        for copy, shape in zip(together.split([*map(math.prod, shapes)]), shapes):
            yield copy.view(shape)
