"""All experts of a model in one vector, for as long as they are trained.

Clipping, the optimizer, a checkpoint and an exchange between processes take one tensor each, and a
step makes one copy of it in the model's dtype, which the layers multiply with.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..method.experts import Stack, expert_layers, groups


class ExpertVector:
    """The vector holds every lora_A, then every router, then every lora_B, group by group; the
    parameters of the layers become views of it."""

    def __init__(self, model: nn.Module):
        self.groups, self.layers = groups(model), expert_layers(model)
        layers = [layer for group in self.groups for layer in group]
        (self.scaling,) = {layer.scaling for layer in layers}
        routed = [[m for m in group if m.experts > 1] for group in self.groups]
        owners = [*((m, "lora_A") for m in layers), *((m, "router") for g in routed for m in g),
                  *((m, "lora_B") for m in layers)]
        self.parameters: list[Tensor] = [getattr(*owner) for owner in owners]
        # What a copy is cut into, as (rows, columns): A and routers of each group, B of each layer.
        self.shapes = [
            [(sum(m.experts * m.rank for m in g), g[0].in_features) for g in self.groups],
            [(sum(m.experts for m in g), g[0].in_features) for g in routed if g],
            [(m.experts * m.rank, m.out_features) for m in layers]]
        self.vector = nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters]))
        self.parameters = [nn.Parameter(view) for view in self.views(self.vector.detach())]
        for (layer, name), parameter in zip(owners, self.parameters):
            setattr(layer, name, parameter)

    def views(self, vector: Tensor) -> list[Tensor]:
        """The vector, or its gradient, as one view for each of `parameters`."""
        parts = vector.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters)]

    def stacks(self) -> list[Stack]:
        """What each group multiplies with: parts of one copy, whose gradient the vector gets."""
        parts = iter(_Copy.apply(self.vector, self))
        A = [next(parts) for _ in self.groups]
        routers = [next(parts) if group[0].experts > 1 else None for group in self.groups]
        return [Stack(A_g, routers_g, [next(parts) for _ in group])
                for group, A_g, routers_g in zip(self.groups, A, routers)]


class _Copy(torch.autograd.Function):
    """vector -> A of each group and B of each layer, times its scaling, in the model's dtype, and
    between them the routers of each group, in float32."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, experts: ExpertVector) -> tuple[Tensor, ...]:
        ctx.experts, dtype = experts, experts.groups[0][0].weight.dtype
        A, routers, B = vector.split([sum(map(prod, shapes)) for shapes in experts.shapes])
        regions = A.to(dtype), routers, (experts.scaling * B).to(dtype)
        return *(part.view(shape) for region, shapes in zip(regions, experts.shapes)
                 for part, shape in zip(region.split([*map(prod, shapes)]), shapes)),

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        experts, each = ctx.experts, iter(gradients)
        gradient = torch.empty_like(experts.vector)
        regions = gradient.split([sum(map(prod, shapes)) for shapes in experts.shapes])
        for region, shapes in zip(regions, experts.shapes):
            if shapes:
                region.copy_(torch.cat([next(each).flatten() for _ in shapes]))
        regions[-1].mul_(experts.scaling)
        return gradient, None
