"""All experts of a model in one vector, for as long as they are trained.

Clipping, the optimizer, a checkpoint and an exchange between processes take one tensor each, and a
step makes one copy of it in the model's dtype, which the layers multiply with.
"""

import re
from collections import defaultdict
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..method.experts import Stack, expert_layers, groups, slots_of


class ExpertVector:
    """The vector holds every lora_A, then every router, then every lora_B, group by group; the
    parameters of the layers become views of it.

    alike: stacks have the same shapes in all decoder layers, so that these are one to a compiler.
    """

    def __init__(self, model: nn.Module, alike: bool = False):
        self.groups, self.layers = groups(model), expert_layers(model)
        (self.scaling,) = {layer.scaling for layer in self.layers.values()}
        names, alikes = {m: name for name, m in self.layers.items()}, defaultdict[Any, list](list)
        places = [tuple(re.sub(r"\d+", "*", names[m]) if alike else names[m] for m in group)
                  for group in self.groups]
        for place, group in zip(places, self.groups):
            alikes[place] += group
        self.slots = [slots_of(g, alikes[place]) for place, g in zip(places, self.groups)]
        # The parts of a copy, and the parameter in each; a layer without a router has only room.
        each = [(m, s) for group, s in zip(self.groups, self.slots) for m in group]
        parts = [*((m, "lora_A", s.E * s.r * m.in_features) for m, s in each),
                 *((m, "router", s.E * m.in_features) for m, s in each if s.E > 1),
                 *((m, "lora_B", s.E * s.r * m.out_features) for m, s in each)]
        owners = [part[:2] for part in parts if getattr(*part[:2]) is not None]
        self.parameters = {f"{names[m]}.{part}": getattr(m, part) for m, part in owners}
        self.vector = nn.Parameter(torch.cat([
            p.detach().flatten() for p in self.parameters.values()]))
        for owner, name, view in zip(owners, self.parameters, self.views(self.vector.detach())):
            self.parameters[name] = parameter = nn.Parameter(view)
            setattr(*owner, parameter)
        # What a copy is cut into, as (rows, columns): A and routers of each group, B of each layer.
        sizes = [(len(g), s.E, s.r, g[0].in_features) for g, s in zip(self.groups, self.slots)]
        self.shapes = [[(n * E * r, in_) for n, E, r, in_ in sizes],
                       [(n * E, in_) for n, E, _, in_ in sizes if E > 1],
                       [(s.E * s.r, m.out_features) for m, s in each]]
        # How many numbers of each part are its parameter's, and all: zeros follow in empty slots
        # (and in empty ranks, of frozen maps, which have E = 1).
        self.parts = [(0 if (p := getattr(m, name)) is None else p.numel(), size)
                      for m, name, size in parts]

    def views(self, vector: Tensor) -> list[Tensor]:
        """The vector, or its gradient, as a view for each of `parameters`."""
        like = self.parameters.values()
        return [part.view_as(p) for part, p in zip(vector.split([p.numel() for p in like]), like)]

    def stacks(self) -> list[Stack]:
        """What each group multiplies with: parts of one copy, whose gradient the vector gets."""
        parts = iter(_Copy.apply(self.vector, self))
        A = [next(parts) for _ in self.slots]
        routers = [next(parts) if slots.E > 1 else None for slots in self.slots]
        return [Stack(A_g, [next(parts) for _ in group], routers_g, slots.empty, slots.top_k)
                for group, slots, A_g, routers_g in zip(self.groups, self.slots, A, routers)]


class _Copy(torch.autograd.Function):
    """vector -> A of each group and B of each layer, times its scaling, in the model's dtype, and
    between them the routers of each group, in float32."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, experts: ExpertVector) -> tuple[Tensor, ...]:
        ctx.experts, dtype = experts, experts.groups[0][0].weight.dtype
        sizes = [sum(map(prod, shapes)) for shapes in experts.shapes]
        if sum(sizes) > len(vector):                             # some slots are empty
            zeros = vector.new_zeros(max(size - own for own, size in experts.parts))
            pieces = vector.split([own for own, _ in experts.parts])
            vector = torch.cat([x for piece, (own, size) in zip(pieces, experts.parts)
                                for x in (piece, zeros[:size - own])])
        A, routers, B = vector.split(sizes)
        regions = A.to(dtype), routers, (experts.scaling * B).to(dtype)
        return *(part.view(shape) for region, shapes in zip(regions, experts.shapes)
                 for part, shape in zip(region.split([*map(prod, shapes)]), shapes)),

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        experts, each = ctx.experts, iter(gradients)
        sizes = [sum(map(prod, shapes)) for shapes in experts.shapes]
        gradient = experts.vector.new_empty(sum(sizes))
        regions = gradient.split(sizes)
        for region, shapes in zip(regions, experts.shapes):
            if shapes:
                region.copy_(torch.cat([next(each).flatten() for _ in shapes]))
        regions[-1].mul_(experts.scaling)
        if len(gradient) > len(experts.vector):
            pieces = gradient.split([size for _, size in experts.parts])
            gradient = torch.cat([piece[:own] for piece, (own, _) in zip(pieces, experts.parts)])
        return gradient, None
