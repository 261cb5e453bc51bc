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
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..method.experts import PARTS, ExpertLinear, Stack, expert_layers, groups


class _Part:
    """One of PARTS of all layers, and the memory of its copies."""

    def __init__(self, name: str):
        self.name = name
        self.parameters: list[nn.Parameter] = []
        self.scalings: list[float] = []      # of each lora_B; none of other parts
        self.shapes: list[list[int]] = []    # of each copy: layers, slots of a layer, in or out
        self.at: list[tuple[int, ...]] = []  # the copy, and the layer in it, of each parameter

    def add(self, layers: Sequence[ExpertLinear], slots: Sequence[int], width: int) -> None:
        """Let a copy hold the parameters of some layers, with `slots` for each: (E, r) or (E,)."""
        for i, layer in enumerate(layers):
            if (parameter := getattr(layer, self.name)) is not None:     # one expert: no router
                self.parameters.append(parameter)
                self.at.append((len(self.shapes), i))
                self.scalings += [layer.scaling] if self.name == "lora_B" else []
        self.shapes.append([len(layers), *slots, width])

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make the memory of the copies; what no parameter fills stays 0."""
        self.memory = torch.zeros(sum(map(math.prod, self.shapes)), dtype=dtype, device=device)
        self.places = self.of_parameters(self.memory)

    def of_copies(self, memory: Tensor) -> list[Tensor]:
        """The parts of `memory`, or of its gradient, that each copy has."""
        parts = memory.split([*map(math.prod, self.shapes)])
        return [part.view(shape) for part, shape in zip(parts, self.shapes)]

    def of_parameters(self, memory: Tensor) -> list[Tensor]:
        """The parts of `memory`, or of its gradient, that each parameter has."""
        copies = self.of_copies(memory)
        return [copies[number][i][tuple(map(slice, p.shape))]
                for p, (number, i) in zip(self.parameters, self.at)]


class _Copy(torch.autograd.Function):
    """The parameters of a part -> its copies, (slots of all their layers, in or out)."""

    @staticmethod
    def forward(ctx: Any, part: _Part, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.part = part
        torch._foreach_copy_(part.places, torch._foreach_mul(parameters, part.scalings)
                             if part.scalings else parameters)
        return *(copy.flatten(0, -2) for copy in part.of_copies(part.memory)),

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        part, together = ctx.part, torch.cat([g.flatten() for g in gradients])
        views = part.of_parameters(together.to(part.parameters[0].dtype))
        if part.scalings:
            torch._foreach_mul_(views, part.scalings)
        return None, *views


class Copies:
    """Copies of the experts of `model`.

    alike: they have the same shapes in all decoder layers, so that these are one to a compiler.
    """

    def __init__(self, model: nn.Module, alike: bool = False):
        self.groups, self.layers = groups(model), expert_layers(model)
        self.parts = {name: _Part(name) for name in PARTS}
        names, alikes = {m: n for n, m in self.layers.items()}, defaultdict[str, list](list)
        kinds = [re.sub(r"\d+", "*", names[g[0]]) if alike else names[g[0]] for g in self.groups]
        for kind, group in zip(kinds, self.groups):
            alikes[kind] += group
        self.slots = [self._slots(group, alikes[kind]) for kind, group in zip(kinds, self.groups)]
        for layer in [*self.layers.values()][:1]:
            for name, part in self.parts.items():
                part.allocate(layer.lora_A.dtype if name == "router" else layer.weight.dtype,
                              layer.lora_A.device)

    def _slots(self, group: Sequence[ExpertLinear], alikes: Sequence[ExpertLinear],
               ) -> tuple[int, int, Tensor | None]:
        """Have copies made for a group, with slots for the largest layer of `alikes`. Returns the
        slots E, top_k and what is added to router logits."""
        E, r, k = (max(getattr(m, size) for m in alikes) for size in ("experts", "rank", "top_k"))
        self.parts["lora_A"].add(group, (E, r), group[0].in_features)
        if E > 1:
            self.parts["router"].add(group, (E,), group[0].in_features)
        for m in group:
            self.parts["lora_B"].add([m], (E, r), m.out_features)
        if all(m.experts == E for m in alikes):
            return E, k, None
        empty = (torch.arange(E) >= torch.tensor([[m.experts] for m in group])).flatten()
        return E, k, torch.zeros(len(empty)).masked_fill_(empty, -math.inf).to(group[0].lora_A)

    @contextmanager
    def multiplying(self) -> Iterator[None]:
        """Meanwhile the layers multiply with copies of what their parameters are now."""
        A, routers, B = (iter(_Copy.apply(part, *part.parameters) if part.parameters else ())
                         for part in self.parts.values())
        for group, (E, top_k, empty) in zip(self.groups, self.slots):
            group[0].stack = Stack(next(A), [next(B) for _ in group],
                                   next(routers) if E > 1 else None, empty, top_k)
        try:
            yield
        finally:
            for group in self.groups:
                group[0].stack = None
